// A switchable graph in JavaScript: the base model or any adapter, chosen for each call.
//
//     y = op(x, W) + up(down(x, A), B)        A and B of every slot are given in each call, of rank 0 where it is empty
//
// Python: export_onnx(model, inputs, "model.onnx", adapters="switchable", slots="required")
//         save_onnx_adapter(model, "task.safetensors", name="task")
const TYPES = { F16: ["float16", globalThis.Float16Array ?? Uint16Array], F32: ["float32", Float32Array], F64: ["float64", Float64Array] };
const ARRAYS = Object.fromEntries(Object.values(TYPES));
const text = (bytes) => new TextDecoder().decode(bytes);

export class Switchable {
  /** @param ort onnxruntime-web or onnxruntime-node  @param graph the bytes of the file  @param options of the session */
  static async load(ort, graph, options = {}) {
    const bytes = new Uint8Array(graph), slots = metadata(bytes)["lora_fx.slots"];
    if (!slots) throw new Error('the graph has no slots: export it with adapters="switchable", slots="required"');
    const model = Object.assign(new Switchable(), { ort, manifest: JSON.parse(slots), adapters: new Map() });
    model.session = await ort.InferenceSession.create(bytes, options);
    for (const name of Object.keys(model.manifest.inputs)) // one with a default would silently stay what it is
      if (!model.session.inputNames.includes(name)) throw new Error(`${name} is optional, and would stay empty: export with slots="required"`);
    model.empty = {};
    for (const [name, { dtype, shape, rank }] of Object.entries(model.manifest.inputs)) {
      const sizes = shape.map((size) => size || rank);
      model.empty[name] = new ort.Tensor(dtype, new ARRAYS[dtype](sizes.reduce((a, b) => a * b)), sizes);
    }
    return model;
  }

  /** Read an adapter, and check that it is whole, and of this base model. @param file the bytes of a .safetensors file */
  async addAdapter(name, file) {
    const bytes = new Uint8Array(file), size = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(0, true));
    const { __metadata__: said, ...found } = JSON.parse(text(bytes.subarray(8, 8 + size)));
    const base = String(this.manifest.base), names = Object.keys(found).sort(), factors = {}, ranks = {};
    if (said?.["lora_fx.base"] !== base) throw new Error(`it is for base model ${said?.["lora_fx.base"]}, the graph is of ${base}`);
    const described = ({ data_offsets, dtype, shape }) => `{"data_offsets": [${data_offsets.join(", ")}], "dtype": "${dtype}", "shape": [${shape.join(", ")}]}`;
    const table = `{${names.map((key) => `${JSON.stringify(key)}: ${described(found[key])}`).join(", ")}}`;
    const hashed = new Blob([base, "\0", table, "\0", bytes.subarray(8 + size)]);
    const hash = new Uint8Array(await crypto.subtle.digest("SHA-256", await hashed.arrayBuffer()));
    const digest = Array.from(hash, (byte) => byte.toString(16).padStart(2, "0")).join("");
    if (said["lora_fx.sha256"] !== digest) throw new Error("it is damaged: its tensors are not the ones that were saved");
    for (const key of names) {
      const slot = this.manifest.inputs[key], [dtype, Numbers] = TYPES[found[key].dtype], shape = found[key].shape;
      const fits = slot?.dtype === dtype && slot.shape.length === shape.length && slot.shape.every((s, k) => s === 0 || s === shape[k]);
      if (!fits) throw new Error(`the graph has no slot ${key} for ${dtype} [${shape}]`);
      (ranks[slot.weight] ??= []).push(shape[slot.shape.indexOf(0)]);
      const part = bytes.slice(...found[key].data_offsets.map((at) => 8 + size + at));
      factors[key] = new this.ort.Tensor(dtype, new Numbers(part.buffer), shape);
    }
    for (const [weight, own] of Object.entries(ranks))
      if (own.length !== 2 || own[0] !== own[1]) throw new Error(`A and B of ${weight} are of ranks ${own}`);
    this.adapters.set(name, factors);
  }

  /** @param feeds the model's own inputs by name  @param adapter the name of one; none is the base model */
  async run(feeds, adapter) {
    if (adapter && !this.adapters.has(adapter)) throw new Error(`there is no adapter ${adapter}: add it first`);
    return this.session.run({ ...feeds, ...this.empty, ...(adapter && this.adapters.get(adapter)) });
  }
}

/** The metadata of an ONNX file: field 14 of a ModelProto, entries of a key (1) and a value (2). */
function metadata(bytes) {
  const fields = function* (at, end) {
    const varint = () => {
      for (let value = 0, unit = 1; ; unit *= 128) {
        value += (bytes[at] & 127) * unit;
        if (bytes[at++] < 128) return value;
      }
    };
    while (at < end) {
      const tag = varint(), value = varint(); // of a field with a length, that
      if (tag & 2) yield [tag >> 3, at, at + value];
      if (tag & 2) at += value;
    }
  };
  const found = {};
  for (const [field, from, to] of fields(0, bytes.length)) {
    if (field !== 14) continue;
    const entry = Object.fromEntries([...fields(from, to)].map(([key, a, b]) => [key, text(bytes.subarray(a, b))]));
    found[entry[1]] = entry[2];
  }
  return found;
}
