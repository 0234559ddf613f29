// A heat map in colours, the same as those of `blip2 explain`: from blue over red to yellow, the lighter the more.

const STOPS = [
  [20, 20, 120],
  [150, 20, 120],
  [240, 80, 40],
  [255, 240, 90],
];
const MOST_GLOW = 0.7;

export function glow(value) {
  const at = Math.min(Math.max(value, 0), 1) * (STOPS.length - 1);
  const below = Math.min(Math.floor(at), STOPS.length - 2);
  return STOPS[below].map((from, i) => from + (STOPS[below + 1][i] - from) * (at - below));
}

// RGBA of every value; what counted nothing is transparent.
export function colours(values) {
  return Uint8ClampedArray.from(values.flatMap((value) => [...glow(value), 255 * MOST_GLOW * value]));
}

// Draws a map; the browser smooths it when it stretches the canvas over the picture.
export function draw(canvas, { side, values }) {
  canvas.width = side;
  canvas.height = side;
  canvas.getContext("2d").putImageData(new ImageData(colours(values), side, side), 0, 0);
}
