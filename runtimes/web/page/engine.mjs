// The page's Web Worker: opens a bundle and generates, so that the page stays responsive.

import { fromFiles, fromUrl, openBundle, parseIds } from "/xexport/xexport.mjs";

const SCRIPTS = { wasm: "/ort/ort.wasm.min.mjs", webgpu: "/ort/ort.webgpu.min.mjs" };

const SHOWN_MS = 40; // the page is told so often: it draws slower than a small model writes

// onnxruntime-web makes its memory here, and has no call that says how large it has become
let heap;
WebAssembly.Memory = class extends WebAssembly.Memory {
  constructor(descriptor) {
    super(descriptor);
    heap = this;
  }
};

let bundle;
let abort;
const tell = (event, parts) => postMessage({ event, ...parts });
const memory = () => heap?.buffer.byteLength ?? 0;

async function open({ url, files, provider, threads }) {
  const ort = await import(SCRIPTS[provider]);
  ort.env.wasm.wasmPaths = new URL("/ort/", location.href).href;
  const onProgress = (done, total) => tell("progress", { done, total });
  const source = files ? fromFiles(files) : fromUrl(url);
  bundle = await openBundle(source, { ort, provider, threads, onProgress });
  const { name, manifest, loadMs, tokenizer } = bundle;
  tell("opened", { name, manifest, loadMs, memory: memory(), readsText: tokenizer.readsText });
}

async function generate({ prompt, options }) {
  abort = new AbortController();
  const stream = bundle.stream();
  try {
    const given = bundle.tokenizer.readsText ? prompt : parseIds(prompt);
    const generation = stream.generate(given, { ...options, signal: abort.signal });
    const { stats } = generation;
    let [text, ms, before, told] = ["", [], 0, performance.now()];
    const flush = () => {
      tell("pieces", { text, ms, stats, memory: memory() });
      [text, ms, told] = ["", [], performance.now()];
    };
    for await (const piece of generation) {
      text += piece;
      ms.push(stats.decodeMs - before);
      before = stats.decodeMs;
      if (performance.now() - told < SHOWN_MS) continue;
      flush();
      await turn();
    }
    flush();
    tell("done", { ids: generation.ids, stats, memory: memory() });
  } finally {
    stream.release();
  }
}

/** A turn of the event loop, so that "stop" is heard. */
function turn() {
  return new Promise((done) => {
    const { port1, port2 } = new MessageChannel();
    port1.onmessage = done;
    port2.postMessage(0);
  });
}

onmessage = async ({ data }) => {
  try {
    if (data.op === "stop") abort?.abort();
    else if (data.op === "open") await open(data);
    else await generate(data);
  } catch (error) {
    tell("failed", { message: error instanceof Error ? error.message : String(error) });
  }
};
