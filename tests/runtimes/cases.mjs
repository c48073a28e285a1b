// What `tests.runtimes` holds a runtime in JavaScript to, in node and in a browser. `case.json` names feeds and adapters.
import { Switchable } from "./adapters.mjs";

const said = (error) => `${error.message ?? error}`;
const numbers = ({ dims, data }) => ({ dims: [...dims], data: Array.from(data, Number) });

export async function run(ort, read) {
  const { feeds: given, output, adapters } = JSON.parse(new TextDecoder().decode(await read("case.json")));
  const feeds = {};
  for (const [name, { type, dims, data }] of Object.entries(given))
    feeds[name] = new ort.Tensor(type, type === "int64" ? BigInt64Array.from(data.map(BigInt)) : Float32Array.from(data), dims);
  const model = await Switchable.load(ort, await read("required.onnx"));
  for (const name of adapters) await model.addAdapter(name, await read(`${name}.safetensors`));
  const outputs = {};
  for (const name of ["", ...adapters, ""]) outputs[name] = numbers((await model.run(feeds, name))[output]);

  const refusals = {};
  const refused = async (name, call) => (refusals[name] = await call().then(() => "", said));
  await refused("optional", async () => Switchable.load(ort, await read("optional.onnx")));
  await refused("unknown", () => model.run(feeds, "none"));
  await refused("foreign", async () => model.addAdapter("x", await read("foreign.safetensors")));
  const whole = await read(`${adapters[0]}.safetensors`);
  const right = JSON.stringify(outputs[adapters[0]]);
  let wrong = 0;
  for (let at = 0; at < whole.length; at += Math.ceil(whole.length / 400)) {
    const damaged = Uint8Array.from(whole);
    damaged[at] ^= 1 << at % 8;
    const loaded = await model.addAdapter("damaged", damaged).then(() => true, () => false);
    if (loaded && JSON.stringify(numbers((await model.run(feeds, "damaged"))[output])) !== right) wrong += 1;
  }
  // Without the loader: A and B are given to inputs that have defaults.
  const plain = await ort.InferenceSession.create(await read("optional.onnx"));
  const silent = await plain.run({ ...feeds, ...model.adapters.get(adapters[0]) }).then((o) => numbers(o[output]), said);
  return { outputs, refusals, wrong, silent };
}
