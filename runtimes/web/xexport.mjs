// Opens a bundle that `xexport MODEL --target web-...` wrote, and streams tokens with onnxruntime-web.
//
//     import * as ort from "onnxruntime-web/wasm";
//     import { fromUrl, openBundle } from "xexport-web";
//     const bundle = await openBundle(fromUrl("/rwkv-web-int8"), { ort });
//     for await (const piece of bundle.stream().generate("Call me ", { temperature: 0 })) show(piece);

import { Engine } from "./cell.mjs";
import { BundleError, RuntimeFailure, brief } from "./errors.mjs";
import { MANIFEST_NAME, decodeManifest, readEntry } from "./manifest.mjs";
import { Stream } from "./stream.mjs";
import { loadTokenizer } from "./tokenizers.mjs";

export { BundleError, InputError, LimitError, RuntimeFailure, XexportError } from "./errors.mjs";
export { SCHEMA_VERSION } from "./manifest.mjs";
export { fromFiles, fromUrl } from "./sources.mjs";
export { parseIds } from "./tokenizers.mjs";

const PROVIDERS = ["wasm", "webgpu"];

/** An opened bundle; streams share its weights. */
export class Bundle {
  /** @hideconstructor made by {@link openBundle} */
  constructor(name, manifest, engine, tokenizer, loadMs) {
    this.name = name;
    this.manifest = manifest;
    this.engine = engine;
    this.tokenizer = tokenizer;
    this.provider = engine.provider;
    this.loadMs = loadMs;
  }

  /** A new stream at its first token. */
  stream() {
    return new Stream(this.engine.cell(1), this.manifest, this.tokenizer);
  }

  /** Give the memory of the graph back. */
  release() {
    return this.engine.release();
  }
}

/**
 * Read a bundle, check that it arrived whole, and open its graph.
 *
 * @param {import("./xexport.d.ts").Source} source fromUrl(), fromFiles(), or fromFolder() in Node
 * @param {import("./xexport.d.ts").OpenOptions} options
 * @returns {Promise<Bundle>}
 * @throws {BundleError} no bundle, of another schema version, or a file is missing or was changed
 * @throws {RuntimeFailure} onnxruntime-web can't run it here
 */
export async function openBundle(source, options) {
  const { verify = true, tokenizers, onProgress } = options;
  const manifest = decodeManifest(await source.read(MANIFEST_NAME));
  // a bundle for another runtime's WebGPU ("WebGpuExecutionProvider") is one for this one's
  const provider = options.provider ?? (/webgpu/i.test(manifest.provider) ? "webgpu" : "wasm");
  const ort = typeof options.ort === "function" ? await options.ort(provider) : options.ort;
  await checkProvider(provider);
  const graphs = graphsOf(manifest);
  const names = new Set(graphs.values());
  const wanted = manifest.files.filter((f) => names.has(f.path) || f.path.endsWith(".onnx.data"));
  const total = wanted.reduce((sum, entry) => sum + entry.bytes, 0);
  let done = 0;
  const onBytes = (count) => onProgress?.((done += count), total);
  const files = new Map();
  for (const entry of wanted) files.set(entry.path, await readEntry(source, entry, { verify, onBytes }));
  const tokenizer = await loadTokenizer(manifest, source, { verify, tokenizers });
  const began = performance.now();
  const sessions = await openSessions(ort, manifest, graphs, files, { ...options, provider });
  const engine = new Engine(ort, manifest, provider, sessions);
  return new Bundle(source.name, manifest, engine, tokenizer, performance.now() - began);
}

/** Length -> file: one graph for every length (0), or one for each that the target prepared. */
function graphsOf(manifest) {
  const rows = Object.entries(manifest.graphs ?? {});
  if (rows.length === 0) return new Map([[0, manifest.graph]]);
  return new Map(rows.map(([length, file]) => [Number(length), file]));
}

async function checkProvider(provider) {
  if (!PROVIDERS.includes(provider)) {
    throw new RuntimeFailure("unknown backend", { got: provider, allowed: PROVIDERS.join(", ") });
  }
  if (provider !== "webgpu") return;
  const gpu = globalThis.navigator?.gpu;
  const adapter = gpu === undefined ? null : await gpu.requestAdapter();
  if (adapter === null) {
    throw new RuntimeFailure("WebGPU can't be used here", {
      got: gpu === undefined ? "no navigator.gpu" : "no adapter",
      allowed: "wasm",
      fix: "use a browser with WebGPU on https:// or localhost, or WebAssembly (the backend wasm)",
    });
  }
}

async function openSessions(ort, manifest, graphs, files, { provider, threads = 0, profile = false, steps = true }) {
  ort.env.logLevel = "error";
  if (threads > 0) ort.env.wasm.numThreads = threads;
  const external = Array.from(files).filter(([name]) => name.endsWith(".onnx.data"));
  const options = {
    executionProviders: [provider],
    externalData: external.map(([path, data]) => ({ path, data })),
    enableProfiling: profile,
    logSeverityLevel: 3,
  };
  if (provider === "webgpu") {
    const onDevice = manifest.state.filter((s) => s.dtype !== "int64").map((s) => [s.output, "gpu-buffer"]);
    options.preferredOutputLocation = Object.fromEntries(onDevice);
  }
  const sessions = new Map();
  try {
    for (const [length, name] of graphs) {
      sessions.set(length, await ort.InferenceSession.create(files.get(name), options));
    }
    const graph = files.get(manifest.graph);
    if (steps && provider === "webgpu" && graphs.has(0) && manifest.model.form !== "whole" && branches(graph)) {
      const unit = manifest.model.input?.multiple ?? 1;
      const fixed = { ...options, freeDimensionOverrides: { B: 1, T: unit } };
      sessions.set(unit, await ort.InferenceSession.create(graph, fixed));
    }
  } catch (error) {
    for (const session of sessions.values()) await session.release();
    throw new RuntimeFailure(`onnxruntime-web can't open the graph with ${provider}`, {
      got: brief(error),
      fix: `${provider === "webgpu" ? "use WebAssembly (the backend wasm), or " : ""}export the model for a target web-*`,
    });
  }
  for (const session of sessions.values()) checkSignature(session, manifest);
  return sessions;
}

/**
 * Whether a graph has a node `If`. An `If` is computed on the CPU, and what passes through it, the state too, is
 * copied from the device and back. Most choose an operator's body by the length: where that is known, ONNX Runtime
 * takes the branch when it opens the graph, and everything stays on the device.
 */
function branches(graph) {
  const node = [0x22, 2, 0x49, 0x66]; // NodeProto.op_type, of two bytes: "If"
  for (let at = graph.indexOf(node[0]); at >= 0; at = graph.indexOf(node[0], at + 1)) {
    if (node.every((byte, i) => graph[at + i] === byte)) return true;
  }
  return false;
}

/** Refuse a graph whose state is not what the manifest says. */
function checkSignature(session, manifest) {
  const lacking = [
    ...manifest.state.filter((s) => !session.inputNames.includes(s.name)).map((s) => s.name),
    ...["logits", ...manifest.state.map((s) => s.output)].filter((n) => !session.outputNames.includes(n)),
  ];
  if (lacking.length > 0) {
    throw new BundleError("the graph's inputs and outputs are not those of the manifest", {
      got: `no ${lacking.slice(0, 4).join(", ")}`,
      fix: "export the model again",
    });
  }
}
