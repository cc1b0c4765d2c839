// manifest.json and the files that it lists: schema version, safe names, sizes, SHA-256.

import { BundleError, brief } from "./errors.mjs";

/** The schema version that this package reads (core/manifest.py). */
export const SCHEMA_VERSION = 1;
export const MANIFEST_NAME = "manifest.json";
/** Graph input int64 [1]: of how many of the last positions logits are computed; 0 means all. */
export const KEEP_INPUT = "logits_to_keep";

/**
 * Parse and check a manifest.
 *
 * @param {Uint8Array} bytes the file
 * @returns {import("./xexport.d.ts").Manifest}
 * @throws {BundleError} no JSON, another schema version, a key is missing, or a path leaves the folder
 */
export function decodeManifest(bytes) {
  let row;
  try {
    row = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch (error) {
    throw new BundleError("the manifest is not valid JSON", { got: brief(error) });
  }
  if (row === null || typeof row !== "object" || row.schema_version !== SCHEMA_VERSION) {
    throw new BundleError("the manifest has a schema version this package can't read", {
      got: row?.schema_version,
      allowed: SCHEMA_VERSION,
      fix: "take the version of this package that belongs to the xexport that wrote the bundle",
    });
  }
  for (const key of ["graph", "provider", "runtime"]) require(typeof row[key] === "string", key, row[key]);
  for (const key of ["files", "inputs", "outputs", "state"]) require(Array.isArray(row[key]), key, row[key]);
  require(Number.isInteger(row.model?.vocab_size), "model.vocab_size", row.model?.vocab_size);
  for (const name of [row.graph, ...Object.values(row.graphs ?? {}), ...row.files.map((f) => f.path)]) {
    safeName(name);
  }
  const listed = new Set(row.files.map((f) => f.path));
  for (const name of [row.graph, ...Object.values(row.graphs ?? {})]) {
    require(listed.has(name), "files", `no ${name} among ${[...listed].join(", ")}`);
  }
  return row;
}

function require(holds, key, got) {
  if (!holds) throw new BundleError(`the manifest's ${key} is missing or wrong`, { got: JSON.stringify(got) });
}

/**
 * A plain file name of a bundle.
 *
 * @throws {BundleError} it is absolute, has a separator, or is `.` or `..`
 */
export function safeName(name) {
  if (typeof name !== "string" || !name || name === "." || name === ".." || /[/\\:\0?#%]/.test(name)) {
    throw new BundleError("a path in the manifest leaves the bundle's folder", { got: name });
  }
  return name;
}

/**
 * Read one file that the manifest lists.
 *
 * @param {import("./xexport.d.ts").Source} source where the bundle lies
 * @param {{path: string, bytes: number, sha256: string}} entry its row in the manifest
 * @param {{verify: boolean, onBytes?: (count: number) => void}} options `onBytes` is told of bytes as they come
 * @returns {Promise<Uint8Array>}
 * @throws {BundleError} it is missing, of another size, or its SHA-256 is not the manifest's
 */
export async function readEntry(source, entry, { verify, onBytes }) {
  const bytes = await source.read(safeName(entry.path), entry.bytes, onBytes);
  if (bytes.byteLength !== entry.bytes) {
    throw new BundleError(`the bundle's file ${entry.path} has a wrong size`, {
      got: `${bytes.byteLength} bytes`,
      allowed: `${entry.bytes} bytes`,
      fix: "the copy is not complete: copy the folder again",
    });
  }
  if (verify) await checkHash(entry, bytes);
  return bytes;
}

async function checkHash(entry, bytes) {
  const subtle = globalThis.crypto?.subtle;
  if (subtle === undefined) {
    throw new BundleError("SHA-256 is not available on this page, so the bundle can't be checked", {
      got: globalThis.location?.origin,
      fix: "open it from https:// or from localhost, or pass verify: false",
    });
  }
  const digest = new Uint8Array(await subtle.digest("SHA-256", bytes));
  const found = Array.from(digest, (b) => b.toString(16).padStart(2, "0")).join("");
  if (found !== entry.sha256) {
    throw new BundleError(`the bundle's file ${entry.path} was changed`, {
      got: `SHA-256 ${found.slice(0, 16)}...`,
      allowed: `${String(entry.sha256).slice(0, 16)}...`,
      fix: "copy the folder again, or export the model again",
    });
  }
}
