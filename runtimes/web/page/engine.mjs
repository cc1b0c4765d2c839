// The page's Web Worker: opens a bundle and generates, so that the page stays responsive.

import { fromFiles, fromUrl, openBundle, parseIds } from "/xexport/xexport.mjs";

const SCRIPTS = { wasm: "/ort/ort.wasm.min.mjs", webgpu: "/ort/ort.webgpu.min.mjs" };

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
    let before = 0;
    for await (const text of generation) {
      const { stats } = generation;
      tell("piece", { text, ms: stats.decodeMs - before, stats, memory: memory() });
      before = stats.decodeMs;
      // a turn of the event loop, so that "stop" is heard
      await new Promise((done) => {
        const { port1, port2 } = new MessageChannel();
        port1.onmessage = done;
        port2.postMessage(0);
      });
    }
    tell("done", { ids: generation.ids, stats: generation.stats, memory: memory() });
  } finally {
    stream.release();
  }
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
