// What only Node has: bundles in folders, and onnxruntime-web from a given folder of npm packages.

import { webcrypto } from "node:crypto";
import { open } from "node:fs/promises";
import { join } from "node:path";
import { pathToFileURL } from "node:url";

import { BundleError, RuntimeFailure, brief } from "./errors.mjs";

export * from "./xexport.mjs";

globalThis.crypto ??= webcrypto; // Node 18 has it under this name alone

const CHUNK = 1 << 26; // bytes of one read: Node reads at most 2 GiB at once

/**
 * A bundle in a folder.
 *
 * @param {string} folder
 * @returns {import("./xexport.d.ts").Source}
 */
export function fromFolder(folder) {
  return {
    name: folder.split(/[/\\]/).filter(Boolean).at(-1) ?? folder,
    read: async (name, _size, onBytes) => {
      let file;
      try {
        file = await open(join(folder, name));
        const bytes = new Uint8Array((await file.stat()).size);
        for (let at = 0; at < bytes.length; ) {
          const { bytesRead } = await file.read(bytes, at, Math.min(CHUNK, bytes.length - at));
          if (bytesRead === 0) return bytes.subarray(0, at);
          at += bytesRead;
          onBytes?.(bytesRead);
        }
        return bytes;
      } catch (error) {
        throw new BundleError(`the bundle's file ${name} can't be read`, { got: brief(error) });
      } finally {
        await file?.close();
      }
    },
  };
}

/**
 * The module onnxruntime-web.
 *
 * @param {string} [folder] holds node_modules; by default Node looks where it always does
 * @throws {RuntimeFailure} it is not there
 */
export function loadOrt(folder) {
  return load("onnxruntime-web", "ort.node.min.mjs", folder);
}

/**
 * The module @huggingface/tokenizers, which reads a tokenizer.json.
 *
 * @param {string} [folder] holds node_modules
 * @throws {RuntimeFailure} it is not there
 */
export function loadTokenizers(folder) {
  return load("@huggingface/tokenizers", "tokenizers.min.mjs", folder);
}

async function load(name, script, folder) {
  const file = folder && join(folder, "node_modules", name, "dist", script);
  try {
    return await import(file ? pathToFileURL(file).href : name);
  } catch (error) {
    throw new RuntimeFailure(`${name} can't be loaded`, {
      got: brief(error),
      fix: folder ? "python -m xexport.runtimes.environments install web" : `npm install ${name}`,
    });
  }
}
