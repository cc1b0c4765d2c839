// How much memory a model takes in this worker: neither onnxruntime-web nor WebGPU has a call that says it, so what
// they are made of is counted. Imported before them.

let heap;
WebAssembly.Memory = class extends WebAssembly.Memory {
  constructor(descriptor) {
    super(descriptor);
    heap = this;
  }
};

const sizes = new Map(); // live buffers of the device -> bytes
if (globalThis.GPUDevice !== undefined) {
  const { createBuffer } = GPUDevice.prototype;
  GPUDevice.prototype.createBuffer = function (descriptor) {
    const buffer = createBuffer.call(this, descriptor);
    sizes.set(buffer, descriptor.size);
    return buffer;
  };
  const { destroy } = GPUBuffer.prototype;
  GPUBuffer.prototype.destroy = function () {
    sizes.delete(this);
    destroy.call(this);
  };
}

/** Bytes of WebAssembly's memory, and of the buffers on the device. */
export function memory() {
  let device = 0;
  for (const size of sizes.values()) device += size;
  return { heap: heap?.buffer.byteLength ?? 0, device };
}
