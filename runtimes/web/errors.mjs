// Errors that say what is wrong, what was got, what is allowed and how to mend it, as the Python side's do.

/** The base of every error that this package throws on purpose. */
export class XexportError extends Error {
  /**
   * @param {string} what one sentence
   * @param {{got?: unknown, allowed?: unknown, fix?: string}} [parts]
   */
  constructor(what, { got, allowed, fix } = {}) {
    const lines = [what];
    if (got !== undefined) lines.push(`  got:     ${got}`);
    if (allowed !== undefined) lines.push(`  allowed: ${allowed}`);
    if (fix !== undefined) lines.push(`  fix:     ${fix}`);
    super(lines.join("\n"));
    this.name = new.target.name;
    this.what = what;
    this.got = got === undefined ? null : String(got);
    this.allowed = allowed === undefined ? null : String(allowed);
    this.fix = fix ?? null;
  }
}

/** A bundle that is no bundle, is not whole, or was changed. */
export class BundleError extends XexportError {}

/** What the caller gave can't be used. */
export class InputError extends XexportError {}

/** The stream is at the longest length that its state can hold. */
export class LimitError extends XexportError {}

/** onnxruntime-web failed, or can't do what was asked here. */
export class RuntimeFailure extends XexportError {}

/** The first line of whatever was thrown; minified stack traces say nothing. */
export function brief(error) {
  const text = error instanceof Error ? error.message : String(error);
  return text.split("\n", 1)[0].slice(0, 300);
}
