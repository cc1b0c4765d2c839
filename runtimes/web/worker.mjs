// Node's side of the worker protocol (runtimes/worker.py has the table of requests): a bundle in onnxruntime-web,
// driven by the Python side, so that it validates and times what browsers run.
//
//     node worker.mjs FOLDER        FOLDER/node_modules holds onnxruntime-web

import fs from "node:fs";

import { RuntimeFailure, XexportError, brief } from "./errors.mjs";
import { readFrames, writeFrame } from "./frames.mjs";
import { fromFolder, loadOrt, openBundle } from "./node.mjs";

// stdout carries frames alone: what libraries print goes to stderr. onnxruntime-web's WebAssembly writes to the
// descriptor itself, frames go through the stream.
for (const name of ["log", "info", "debug", "warn"]) console[name] = console.error;
const writeSync = fs.writeSync;
let printed = null; // lines, while someone wants them
fs.writeSync = (descriptor, text, ...rest) => {
  if (descriptor !== 1) return writeSync(descriptor, text, ...rest);
  printed?.push(String(text));
  return printed === null ? writeSync(2, text, ...rest) : 0;
};

/** Names of the execution providers in a profile. */
const PROVIDERS = { wasm: "CPUExecutionProvider", webgpu: "WebGpuExecutionProvider" };

let ort;
let bundle;
let prefix;
const cells = [];

const operations = {
  open: async ({ bundle: folder, threads = 0, options = {} }) => {
    const rss = process.memoryUsage.rss();
    prefix = options.profile_prefix;
    ort ??= await loadOrt(process.argv[2]);
    // Node has no WebGPU; the Python side has hashed the files, or was told not to
    const given = { ort, threads, provider: "wasm", verify: false, profile: Boolean(prefix) };
    bundle = await openBundle(fromFolder(folder), given);
    const version = ort.env.versions.web ?? "";
    const provider = PROVIDERS[bundle.provider];
    return [{ runtime: "onnxruntime-web", version, provider, load_seconds: bundle.loadMs / 1000, rss }];
  },
  cell: async ({ batch }) => {
    if (bundle === undefined) throw new RuntimeFailure("no bundle is open in this worker");
    const cell = bundle.engine.cell(batch);
    return [{ cell: cells.push(cell) - 1, keeps: cell.keeps }];
  },
  run: async (row, { inputs }) => {
    const began = process.hrtime.bigint();
    const logits = await cellOf(row).run(inputs, row.keep ?? 0);
    return [{ ns: Number(process.hrtime.bigint() - began) }, { logits: { dtype: "float32", ...logits } }];
  },
  read: async (row) => [{}, await cellOf(row).read()],
  write: async (row, tensors) => [{}, cellOf(row).write(tensors)],
  reset: async (row) => [{}, cellOf(row).reset()],
  assigned: async () => [{ nodes: [] }], // onnxruntime-web can't say; the profile can
  end_profiling: async () => [{ path: endProfiling() }],
  memory: async () => [{ rss: process.memoryUsage.rss(), peak_bytes: process.resourceUsage().maxRSS * 1024 }],
};

function cellOf({ cell }) {
  if (cells[cell] === undefined) throw new RuntimeFailure("there is no such cell in this worker", { got: cell });
  return cells[cell];
}

/** onnxruntime-web prints its profile, as it has no files; it goes into one for the reader of ORT's profiles. */
function endProfiling() {
  if (!prefix) throw new RuntimeFailure("this bundle was not opened to be profiled");
  printed = [];
  for (const session of bundle.engine.sessions.values()) session.endProfiling();
  const text = printed.join("");
  printed = null;
  const path = `${prefix}.json`;
  fs.writeFileSync(path, text.slice(text.indexOf("[\n")));
  return path;
}

async function answer({ header, tensors }) {
  try {
    const operation = Object.hasOwn(operations, header.op) ? operations[header.op] : undefined;
    if (operation === undefined) {
      throw new RuntimeFailure("unknown request", { got: header.op, allowed: Object.keys(operations).join(", ") });
    }
    const [row, out] = await operation(header, tensors);
    return [{ ok: true, ...row }, out];
  } catch (error) {
    if (error instanceof XexportError) {
      const { what, got, allowed, fix } = error;
      return [{ ok: false, error: what, got, allowed, fix }];
    }
    return [{ ok: false, error: "the worker failed", got: brief(error) }];
  }
}

for await (const frame of readFrames(process.stdin)) {
  const [row, out] = await answer(frame);
  writeFrame(process.stdout, row, out ?? {});
}
process.exit(0); // onnxruntime-web's threads would keep the process alive
