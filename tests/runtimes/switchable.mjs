// A switchable graph in onnxruntime-web or onnxruntime-node; run by `tests.runtimes`, which has written the files.
//
//     node switchable.mjs MODULES PACKAGE FOLDER      prints what it returns as JSON
import { readFile } from "node:fs/promises";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { run } from "./cases.mjs";

const [modules, name, folder] = process.argv.slice(2);
const require = createRequire(path.join(modules, "any.js"));
const loaded = await import(pathToFileURL(require.resolve(name)));
const ort = loaded.InferenceSession ? loaded : loaded.default;
if (ort.env.wasm) ort.env.wasm.numThreads = 1;
const read = async (file) => new Uint8Array(await readFile(path.join(folder, file)));
const { version } = JSON.parse(await readFile(path.join(modules, "node_modules", name, "package.json")));
console.log(JSON.stringify({ version, ...(await run(ort, read)) }));
