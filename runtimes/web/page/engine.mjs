// The page's Web Worker: opens a bundle and generates, so that the page stays responsive.

import { memory } from "/page/memory.mjs";
import { fromFiles, fromUrl, openBundle, parseIds } from "/xexport/xexport.mjs";

const SCRIPTS = { wasm: "/ort/ort.wasm.min.mjs", webgpu: "/ort/ort.webgpu.min.mjs" };

const SHOWN_MS = 40; // the page is told so often: it draws slower than a small model writes

let bundle;
let abort;
const tell = (event, parts) => postMessage({ event, ...parts });

async function open({ url, files, provider, threads }) {
  const ort = async (chosen) => {
    tell("backend", { provider: chosen });
    const module = await import(SCRIPTS[chosen]);
    module.env.wasm.wasmPaths = new URL("/ort/", location.href).href;
    return module;
  };
  const tokenizers = () => import("/tokenizers/tokenizers.min.mjs");
  const onProgress = (done, total) => tell("progress", { done, total });
  const source = files ? fromFiles(files) : fromUrl(url);
  bundle = await openBundle(source, { ort, tokenizers, provider, threads, onProgress });
  const { name, manifest, loadMs, tokenizer, engine } = bundle;
  const used = engine.ort.env.wasm.numThreads ?? 1;
  tell("opened", { name, manifest, loadMs, memory: memory(), readsText: tokenizer.readsText, threads: used });
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
