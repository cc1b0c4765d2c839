/** Runs bundles of xexport with onnxruntime-web: WebAssembly or WebGPU, in browsers and Node. */

/** Where a bundle's files come from. */
export interface Source {
  /** What to call the bundle. */
  readonly name: string;
  /** The bytes of one file; `size` is what the manifest says, `onBytes` is told of bytes as they come. */
  read(name: string, size?: number, onBytes?: (count: number) => void): Promise<Uint8Array>;
}

/** A bundle below an address. */
export function fromUrl(base: string | URL): Source;
/** A bundle of files that a person picked, or the one bundle in a folder of them; with paths where they have none. */
export function fromFiles(files: Iterable<File | [path: string, file: File]>): Source;
/** A bundle in a folder (`xexport-web/node`). */
export function fromFolder(folder: string): Source;
/** The module onnxruntime-web, from `folder`/node_modules or where Node looks (`xexport-web/node`). */
export function loadOrt(folder?: string): Promise<object>;
/** The module @huggingface/tokenizers, likewise (`xexport-web/node`). */
export function loadTokenizers(folder?: string): Promise<object>;

/** Ids written as numbers between spaces or commas. */
export function parseIds(text: string): number[];

export const SCHEMA_VERSION: number;
export type Provider = "wasm" | "webgpu";
export type DType = "float32" | "float16" | "int64" | "int32";

/** A file of a bundle. */
export interface FileEntry {
  path: string;
  bytes: number;
  sha256: string;
}

/** A state tensor: graph input `name`, graph output `output`, the value before the first token. */
export interface StateTensor {
  name: string;
  output: string;
  dtype: DType;
  shape: (number | string)[];
  init: number;
}

/** What of manifest.json is used here. */
export interface Manifest {
  schema_version: number;
  target: string;
  precision: string;
  runtime: string;
  provider: string;
  graph: string;
  /** Length -> file, where the target prepared graphs of fixed lengths. */
  graphs?: Record<string, string>;
  files: FileEntry[];
  state: StateTensor[];
  tokenizer: { kind?: string; file?: string; end?: number[] };
  model: {
    family: string;
    title: string;
    parameters: number;
    vocab_size: number;
    max_tokens: number | null;
    form: "chunk" | "whole";
    input?: { kind: "tokens" | "features"; name: string; width: number };
    [key: string]: unknown;
  };
  [key: string]: unknown;
}

export interface Decoder {
  /** The text that became certain with this id; may be empty inside a character. */
  push(id: number): string;
  /** What is left at the end; an unfinished character becomes U+FFFD. */
  flush(): string;
}

export interface Tokenizer {
  readonly kind: string;
  /** False where only ids can be given (no tokenizer, or one that nothing was handed over for). */
  readonly readsText: boolean;
  readonly vocabSize: number | null;
  readonly endIds: ReadonlySet<number>;
  encode(text: string): number[];
  decoder(): Decoder;
}

/** A tensor of plain memory. */
export interface Values<Data = Float32Array | Uint16Array | BigInt64Array | Int32Array> {
  dtype: DType;
  shape: number[];
  data: Data;
}

/** Logits, [B,positions,V]. */
export interface Logits {
  shape: number[];
  data: Float32Array;
}

/** Chooses tokens; the defaults sample from the whole distribution. */
export interface SamplingOptions {
  /** 0 is greedy; 1 by default. */
  temperature?: number;
  /** Nucleus sampling; 1, the default, is off. */
  topP?: number;
  /** 0, the default, is off. */
  topK?: number;
  /** The same seed gives the same text. */
  seed?: number;
}

export interface GenerateOptions extends SamplingOptions {
  /** How many tokens at most; 64 by default. */
  maxTokens?: number;
  /** End before any of these texts, or at any of these ids. */
  stop?: string | number | (string | number)[];
  /** Ends the generation after the token that is being computed. */
  signal?: AbortSignal;
}

export interface GenerationStats {
  promptTokens: number;
  promptMs: number;
  newTokens: number;
  decodeMs: number;
}

/** Pieces of text, each valid Unicode; a piece comes after its token was fed back. */
export interface Generation extends AsyncIterable<string> {
  readonly ids: number[];
  readonly stats: GenerationStats;
}

export interface SavedState {
  position: number;
  tensors: Record<string, Values>;
}

/** One text: ids in, logits out, the state stays inside. */
export interface Stream {
  readonly tokenizer: Tokenizer;
  readonly vocabSize: number;
  readonly maxTokens: number | null;
  readonly position: number;
  feed(ids: ArrayLike<number>, options?: { keep?: number }): Promise<Logits>;
  generate(prompt: string | number[], options?: GenerateOptions): Generation;
  save(): Promise<SavedState>;
  restore(saved: SavedState): void;
  reset(): void;
  release(): void;
}

/** The state of parallel sequences, below Stream: no checks of ids, and features too. */
export interface Cell {
  readonly keeps: boolean;
  run(inputs: Values, keep?: number): Promise<Logits>;
  read(): Promise<Record<string, Values>>;
  write(tensors: Record<string, Values>): void;
  reset(): void;
  release(): void;
}

export interface Engine {
  readonly provider: Provider;
  /** Lengths of one call; `[0]` if a call may have any. */
  readonly lengths: number[];
  cell(batch: number): Cell;
}

export interface Bundle {
  readonly name: string;
  readonly manifest: Manifest;
  readonly engine: Engine;
  readonly tokenizer: Tokenizer;
  readonly provider: Provider;
  /** Milliseconds that onnxruntime-web took to open the graph. */
  readonly loadMs: number;
  stream(): Stream;
  release(): Promise<void>;
}

export interface OpenOptions {
  /** The module onnxruntime-web, or onnxruntime-web/webgpu; or what loads the one for the provider. */
  ort: object | ((provider: Provider) => Promise<object>);
  /** The module @huggingface/tokenizers, or what loads it; only for a bundle with a tokenizer.json. */
  tokenizers?: object | (() => Promise<object>);
  /** The manifest's own by default. */
  provider?: Provider;
  /** Threads of WebAssembly; onnxruntime-web chooses by default. */
  threads?: number;
  /** Check the SHA-256 of every file; true by default. */
  verify?: boolean;
  /** Bytes read so far, and in all. */
  onProgress?: (done: number, total: number) => void;
  /**
   * On WebGPU, open a graph with branches on the length once more for single tokens, whose state then never leaves the
   * device; the weights lie there twice. True by default.
   */
  steps?: boolean;
  /** Time every node (onnxruntime-web's enableProfiling). */
  profile?: boolean;
}

/** Read a bundle, check that it arrived whole, and open its graph. */
export function openBundle(source: Source, options: OpenOptions): Promise<Bundle>;

/** The base of every error that is thrown on purpose: what, got, allowed, and how to mend it. */
export class XexportError extends Error {
  readonly what: string;
  readonly got: string | null;
  readonly allowed: string | null;
  readonly fix: string | null;
}
/** No bundle, not whole, or changed. */
export class BundleError extends XexportError {}
/** What the caller gave can't be used. */
export class InputError extends XexportError {}
/** The stream is at the longest length that its state can hold. */
export class LimitError extends XexportError {}
/** onnxruntime-web failed, or can't do what was asked here. */
export class RuntimeFailure extends XexportError {}
