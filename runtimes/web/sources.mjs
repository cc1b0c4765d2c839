// Where a bundle's files come from: an address, or files that a person picked. Node's folders: node.mjs.

import { BundleError, brief } from "./errors.mjs";
import { MANIFEST_NAME } from "./manifest.mjs";

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
 * A bundle of files that a person picked or dropped (`<input type="file" webkitdirectory>`): the folder itself, or
 * the one bundle that lies somewhere in it.
 *
 * @param {Iterable<File | [path: string, file: File]>} files with the path of each, where it has none of its own
 * @returns {import("./xexport.d.ts").Source}
 * @throws {BundleError} there is no manifest among them, or more than one and none of them on top
 */
export function fromFiles(files) {
  const rows = Array.from(files, (f) => (Array.isArray(f) ? f : [f.webkitRelativePath || f.name, f]));
  const folder = bundleFolder(rows.map(([path]) => path));
  const inside = rows.filter(([path]) => folderOf(path) === folder);
  const byName = new Map(inside.map(([path, file]) => [path.slice(folder.length), file]));
  return {
    name: folder.split("/").at(-2) ?? "picked files",
    read: async (name, size, onBytes) => {
      const file = byName.get(name);
      if (file === undefined) {
        throw new BundleError(`the bundle lacks its file ${name}`, { got: some(byName.keys()), fix: COPY });
      }
      try {
        return size === undefined
          ? new Uint8Array(await file.arrayBuffer())
          : await fill(file.stream(), name, size, onBytes);
      } catch (error) {
        if (error instanceof BundleError) throw error;
        // the file was changed or removed since it was picked
        throw new BundleError(`the bundle's file ${name} can't be read`, { got: brief(error), fix: "pick the folder again" });
      }
    },
  };
}

const COPY = "the copy is not complete: copy the whole folder that `xexport MODEL --target T` wrote";

/** The folder, with its last slash, whose files are the bundle: the nearest to the top, if there is one nearest. */
function bundleFolder(paths) {
  const depth = (folder) => folder.split("/").length;
  const found = paths.filter((path) => baseOf(path) === MANIFEST_NAME).map(folderOf);
  const top = Math.min(...found.map(depth));
  const nearest = found.filter((folder) => depth(folder) === top);
  if (nearest.length === 1) return nearest[0];
  if (nearest.length > 1) {
    throw new BundleError("there are several bundles in this folder", {
      got: some(nearest.map((folder) => folder.slice(0, -1))),
      fix: "pick the folder of one of them",
    });
  }
  throw new BundleError(`this folder is no bundle: it has no ${MANIFEST_NAME}`, {
    got: some(paths),
    fix: "pick a folder that `xexport MODEL --target T` wrote",
  });
}

const baseOf = (path) => path.slice(path.lastIndexOf("/") + 1);
const folderOf = (path) => path.slice(0, path.lastIndexOf("/") + 1);

/** The first names of a list that may be long. */
function some(names) {
  const all = Array.from(names);
  const first = all.slice(0, 8).join(", ") || "no files";
  return all.length > 8 ? `${first} and ${all.length - 8} more` : first;
}
