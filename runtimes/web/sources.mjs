// Where a bundle's files come from: an address, or files that a person picked. Node's folders: node.mjs.

import { BundleError, brief } from "./errors.mjs";

/**
 * A bundle below an address.
 *
 * @param {string | URL} base the folder's address; relative ones are of the page
 * @returns {import("./xexport.d.ts").Source}
 */
export function fromUrl(base) {
  const root = new URL(String(base).replace(/\/?$/, "/"), globalThis.location?.href);
  return {
    name: decodeURIComponent(root.pathname.split("/").at(-2) ?? ""),
    read: async (name, size, onBytes) => {
      const address = new URL(name, root);
      let answer;
      try {
        answer = await fetch(address);
      } catch (error) {
        throw new BundleError("a file of the bundle can't be fetched", { got: `${address}: ${brief(error)}` });
      }
      if (!answer.ok) {
        throw new BundleError(`the bundle lacks its file ${name}`, { got: `${address}: HTTP ${answer.status}` });
      }
      return size === undefined || answer.body === null
        ? new Uint8Array(await answer.arrayBuffer())
        : fill(answer.body, name, size, onBytes);
    },
  };
}

/** One buffer of the size that the manifest says, filled as the parts come: no second copy in memory. */
async function fill(body, name, size, onBytes) {
  const bytes = new Uint8Array(size);
  let at = 0;
  for (const reader = body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return at === size ? bytes : bytes.subarray(0, at);
    if (at + value.byteLength > size) {
      await reader.cancel();
      throw new BundleError(`the bundle's file ${name} is longer than the manifest says`, { allowed: `${size} bytes` });
    }
    bytes.set(value, at);
    at += value.byteLength;
    onBytes?.(value.byteLength);
  }
}

/**
 * A bundle of files that a person picked or dropped (`<input type="file" webkitdirectory>`).
 *
 * @param {Iterable<File>} files of one folder
 * @returns {import("./xexport.d.ts").Source}
 */
export function fromFiles(files) {
  const byName = new Map(Array.from(files, (file) => [file.name, file]));
  const path = Array.from(byName.values())[0]?.webkitRelativePath ?? "";
  return {
    name: path.split("/").at(-2) ?? "picked files",
    read: async (name, _size, onBytes) => {
      const file = byName.get(name);
      if (file === undefined) {
        throw new BundleError(`the bundle lacks its file ${name}`, {
          got: Array.from(byName.keys()).slice(0, 8).join(", ") || "no files",
          fix: "pick the folder that `xexport MODEL --target T` wrote",
        });
      }
      const bytes = new Uint8Array(await file.arrayBuffer());
      onBytes?.(bytes.byteLength);
      return bytes;
    },
  };
}
