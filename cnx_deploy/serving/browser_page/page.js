// The page: loads the network, makes a dropped picture's pixels, runs, and names the classes. Nothing leaves the browser.
import * as ort from "./ort.wasm.bundle.min.mjs";
import {decoded, pixels} from "./pixels.js";

const element = selector => document.querySelector(selector);
const [status, picture, rows, zone] = ["p", "img", "tbody", "label"].map(element);
const say = (text, isError = false) => { status.textContent = text; status.classList.toggle("error", isError); };

ort.env.wasm.numThreads = 1; // so that no headers for cross-origin isolation are needed
ort.env.wasm.wasmPaths = {wasm: new URL("ort-wasm-simd-threaded.wasm", import.meta.url).href};
const model = await (await fetch("model.json")).json();
document.title = element("h1").textContent = model.title;
element("footer").append(...model.notes.map(text => Object.assign(document.createElement("p"), {textContent: text})));
const session = ort.InferenceSession.create(model.file, {executionProviders: ["wasm"]});
session.then(() => say("Ready."), error => say(`The network cannot be loaded: ${error.message}`, true));

function input(bytes) { // (height, width, C) bytes -> what the network takes
  const {channels: C, size: [height, width], mean, std} = model.images, count = height * width;
  if (model.input.kind === "uint8") return new ort.Tensor("uint8", Uint8Array.from(bytes), [1, height, width, C]);
  const values = new Float32Array(C * count), one = Math.fround;
  for (let c = 0; c < C; c++) for (let at = 0; at < count; at++) {
    const unit = one(bytes[at * C + c] / 255);
    values[c * count + at] = model.input.kind === "float" ? unit : one(unit - one(mean[c])) / one(std[c]);
  }
  return new ort.Tensor("float32", values, [1, C, height, width]);
}

function probabilities(values) {
  if (model.output.activation === null) return values;
  if (model.output.activation === "sigmoid") return values.map(value => 1 / (1 + Math.exp(-value)));
  const largest = Math.max(...values), powers = values.map(value => Math.exp(value - largest));
  const sum = powers.reduce((total, value) => total + value, 0);
  return powers.map(value => value / sum);
}

export async function classify(file) { // -> the named classes, the best first: [{name, probability}]
  const network = await session, {rgba, width, height, isOpaque} = await decoded(file), start = performance.now();
  const outputs = await network.run({[model.input.name]: input(pixels(rgba, width, height, model.images))});
  const scores = probabilities(Array.from(outputs[model.output.name].data));
  const ranked = scores.map((probability, index) => ({name: model.class_names?.[index] ?? String(index), probability, index}));
  ranked.sort((one, other) => other.probability - one.probability || one.index - other.index);
  const told = model.thresholds ? ranked.filter(row => row.probability >= model.thresholds[row.index]) : ranked.slice(0, 5);
  return {rows: told, milliseconds: performance.now() - start, isOpaque};
}

async function show(file) {
  rows.replaceChildren(); picture.hidden = true; say(`Looking at ${file.name}…`);
  try {
    const {rows: found, milliseconds, isOpaque} = await classify(file);
    URL.revokeObjectURL(picture.src); picture.src = URL.createObjectURL(file); picture.hidden = false;
    for (const {name, probability} of found) {
      const row = rows.insertRow(); row.insertCell().textContent = name;
      row.insertCell().textContent = `${(100 * probability).toFixed(2)}%`;
      const cell = row.insertCell(); cell.className = "bar";
      cell.append(Object.assign(document.createElement("progress"), {value: probability, ariaLabel: name}));
    }
    say(`${file.name}: ${found.length || "no"} ${model.thresholds ? "labels" : "classes"} in ${Math.round(milliseconds)} ms.` +
      (isOpaque ? "" : " It has transparent parts, whose colours a browser gives only roughly."));
  } catch (error) { say(error.message, true); }
}

element("input").addEventListener("change", event => event.target.files[0] && show(event.target.files[0]));
addEventListener("dragover", event => { event.preventDefault(); zone.classList.add("over"); });
addEventListener("dragleave", () => zone.classList.remove("over"));
addEventListener("drop", event => {
  event.preventDefault(); zone.classList.remove("over");
  event.dataTransfer.files[0] ? show(event.dataTransfer.files[0]) : say("That was no file. Drop a picture.", true);
});
