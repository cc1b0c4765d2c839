// Products of one weight in onnxruntime-web (WebAssembly): float32, and the ways to 8 bits.
// benchmarks/web_products.py writes the graphs and starts this.
//
//     node web_products.mjs PACKAGES GRAPHS SIZES COUNT THREADS

import fs from "node:fs";
import path from "node:path";
import { pathToFileURL } from "node:url";

const [packages, graphs, sizes, count, threads] = process.argv.slice(2);
const file = path.join(packages, "node_modules/onnxruntime-web/dist/ort.node.min.mjs");
const ort = await import(pathToFileURL(file).href);
ort.env.wasm.numThreads = Number(threads);
const kinds = fs.readdirSync(graphs).map((name) => name.split("@")[0]);
const rows = [];
for (const size of sizes.split(",").map(Number)) {
  const sessions = {};
  for (const kind of new Set(kinds)) {
    const graph = fs.readFileSync(path.join(graphs, `${kind}@${size}.onnx`));
    sessions[kind] = await ort.InferenceSession.create(graph, { logSeverityLevel: 3 });
  }
  for (const tokens of [1, 64]) {
    const values = Float32Array.from({ length: tokens * size }, () => Math.random() - 0.5);
    const x = new ort.Tensor("float32", values, [1, tokens, size]);
    const best = {};
    // all kinds take turns, so that a busy machine slows them alike
    for (let round = 0; round < (tokens > 1 ? 8 : 60); round++) {
      for (const [kind, session] of Object.entries(sessions)) {
        const began = process.hrtime.bigint();
        await session.run({ x });
        const us = Number(process.hrtime.bigint() - began) / 1e3 / Number(count);
        if (round > 2) best[kind] = Math.min(best[kind] ?? Infinity, us);
      }
    }
    rows.push({ size, tokens, us: best });
  }
  for (const session of Object.values(sessions)) await session.release();
}
console.log(JSON.stringify({ threads: Number(threads), version: ort.env.versions.web, node: process.version, rows }));
process.exit(0);
