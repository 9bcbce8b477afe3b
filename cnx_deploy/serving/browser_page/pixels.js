// From a picture's file to the pixels of a network: the same as `predict` makes with Pillow, byte for byte of what the
// browser decodes. Resizing is Pillow's: separable, the filter widened by the ratio, fixed point of 22 bits. Pillow goes
// across first; from 13.0 on down first where the height shrinks by more than twice what the width does.
// Source: python-pillow/Pillow, src/libImaging/Resample.c; cnx-deploy, data/pixels.py.

const BITS = 22, MAX_PIXELS = 89e6;
const sinc = x => x === 0 ? 1 : Math.sin(x * Math.PI) / (x * Math.PI);
const FILTERS = { // name: [support, weight at a distance]
  box: [0.5, x => x > -0.5 && x <= 0.5 ? 1 : 0],
  bilinear: [1, x => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, x => (x = Math.abs(x)) >= 1 ? 0 : sinc(x) * (Math.fround(0.54) + Math.fround(0.46) * Math.cos(x * Math.PI))],
  bicubic: [2, x => (x = Math.abs(x)) < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0],
  lanczos: [3, x => x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0],
};

function windows(inSize, outSize, [support, weight]) { // for each output place: the first input, and its weights
  const scale = inSize / outSize, wide = Math.max(scale, 1), reach = support * wide;
  return Array.from({length: outSize}, (_, at) => {
    const centre = (at + 0.5) * scale, first = Math.max(0, Math.trunc(centre - reach + 0.5));
    const last = Math.min(inSize, Math.trunc(centre + reach + 0.5));
    const weights = Array.from({length: last - first}, (_, i) => weight((i + first - centre + 0.5) * (1 / wide)));
    const sum = weights.reduce((total, value) => total + value, 0);
    return [first, Int32Array.from(weights, value => {
      const fixed = (sum === 0 ? value : value / sum) * 2 ** BITS;
      return Math.trunc(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
    })];
  });
}

// Lines of `length` places, `step` bytes apart, become lines of `outLength`; C values a place.
function resampled(source, count, between, length, step, outLength, filter, C, outBetween, outStep) {
  const out = new Uint8ClampedArray(count * outLength * C), places = windows(length, outLength, filter);
  for (let line = 0; line < count; line++) for (let at = 0; at < outLength; at++) {
    const [first, weights] = places[at], to = line * outBetween + at * outStep;
    for (let c = 0; c < C; c++) {
      let sum = 1 << (BITS - 1);
      for (let i = 0, from = line * between + first * step + c; i < weights.length; i++, from += step) sum += source[from] * weights[i];
      out[to + c] = sum >> BITS;
    }
  }
  return out;
}

function nearest(source, W, H, w, h, C) {
  const table = (inSize, outSize) => { // Pillow adds the step up
    const places = []; for (let at = 0, x = inSize / outSize * 0.5; at < outSize; at++, x += inSize / outSize) places.push(Math.trunc(x));
    return places;
  };
  const across = table(W, w), down = table(H, h), out = new Uint8ClampedArray(w * h * C);
  down.forEach((y, row) => across.forEach((x, column) => {
    for (let c = 0; c < C; c++) out[(row * w + column) * C + c] = source[(y * W + x) * C + c];
  }));
  return out;
}

export function resize(source, W, H, w, h, C, made) { // (H, W, C) -> (h, w, C)
  if (made.interpolation === "nearest") return nearest(source, W, H, w, h, C);
  const filter = FILTERS[made.interpolation];
  const across = (from, rows) => w === W ? from : resampled(from, rows, W * C, W, C, w, filter, C, w * C, C);
  const down = (from, columns) => h === H ? from : resampled(from, columns, C, H, columns * C, h, filter, C, C, columns * C);
  const isDownFirst = made.pillow >= 13 && H > h && H - h > 2 * (W - w);
  return isDownFirst ? across(down(source, W), h) : down(across(source, H), w);
}

const even = x => x % 1 === 0.5 || x % 1 === -0.5 ? 2 * Math.round(x / 2) : Math.round(x); // Python's round

export function placement(W, H, made) { // what a picture is resized to, and where its corner lies on the canvas
  const [height, width] = made.size, [h, w] = made.size.map(side => Math.floor(side / made.crop_ratio));
  let size = [w, h];
  const pads = ["border", "corner"].includes(made.crop_mode);
  if (made.crop_mode !== "squash" && h === w && !pads) size = [W, H].map(side => Math.floor(h * side / Math.min(W, H)));
  else if (made.crop_mode !== "squash") {
    const ratio = (pads ? Math.max : Math.min)(W / w, H / h);
    size = [Math.max(1, even(W / ratio)), Math.max(1, even(H / ratio))];
  }
  const margin = spare => spare < 0 ? -Math.floor(-spare / 2) : made.crop_mode === "center-floor" ? Math.floor(spare / 2) : even(spare / 2);
  const offset = made.crop_mode === "corner" ? [0, 0] : [-margin(size[0] - width), -margin(size[1] - height)];
  return {size, offset};
}

export function pixels(rgba, W, H, made) { // (H, W, 4) -> (height, width, C) bytes
  const C = made.channels, source = new Uint8ClampedArray(W * H * C), [height, width] = made.size;
  for (let at = 0; at < W * H; at++) {
    const [r, g, b] = [rgba[4 * at], rgba[4 * at + 1], rgba[4 * at + 2]];
    if (C === 1) source[at] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; // Pillow's grey
    else [source[3 * at], source[3 * at + 1], source[3 * at + 2]] = [r, g, b];
  }
  const {size: [w, h], offset: [left, top]} = placement(W, H, made);
  if (w * h > MAX_PIXELS) throw new Error(`The picture of ${W}x${H} is too long and thin. Crop it first.`);
  const resized = resize(source, W, H, w, h, C, made), out = new Uint8ClampedArray(height * width * C);
  for (let y = 0; y < height; y++) for (let x = 0; x < width; x++) for (let c = 0; c < C; c++) {
    const [column, row] = [x - left, y - top], inside = column >= 0 && row >= 0 && column < w && row < h;
    out[(y * width + x) * C + c] = inside ? resized[(row * w + column) * C + c] : made.fill[c];
  }
  return out;
}

export async function decoded(file) { // upright, its colours as they are stored
  const options = {imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none"};
  let bitmap;
  try { bitmap = await createImageBitmap(file, options); } catch {
    throw new Error(`${file.name} cannot be read as a picture. Drop a JPEG, PNG, WebP, GIF, BMP or AVIF file.`);
  }
  const {width, height} = bitmap;
  if (width * height > MAX_PIXELS) throw new Error(`${file.name} has more than 89 million pixels. Scale it down first.`);
  const context = new OffscreenCanvas(width, height).getContext("2d", {willReadFrequently: true});
  context.drawImage(bitmap, 0, 0);
  const rgba = context.getImageData(0, 0, width, height).data;
  let isOpaque = true;
  for (let at = 3; at < rgba.length && isOpaque; at += 4) isOpaque = rgba[at] === 255;
  return {rgba, width, height, isOpaque};
}
