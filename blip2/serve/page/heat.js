// A grid of numbers from 0 to 1 as colour over the picture.

// As blip2/explain.py has them: lightness rises steadily.
const RAMP = [[0, 24, 15, 62], [0.35, 136, 34, 106], [0.7, 237, 105, 37], [1, 252, 255, 164]];

function colour(value) {
  let i = 1;
  while (i < RAMP.length - 1 && value > RAMP[i][0]) i += 1;
  const [low, high] = [RAMP[i - 1], RAMP[i]];
  const share = (value - low[0]) / (high[0] - low[0]);
  return [1, 2, 3].map((c) => low[c] + share * (high[c] - low[c]));
}

// The model sees every picture stretched to a square, so the grid lies evenly over it. Between the middles of two
// patches the values go over into each other.
function at(grid, x, y) {
  const rows = grid.length;
  const columns = grid[0].length;
  const u = Math.min(Math.max(x * columns - 0.5, 0), columns - 1);
  const v = Math.min(Math.max(y * rows - 0.5, 0), rows - 1);
  const [c, r] = [Math.floor(u), Math.floor(v)];
  const [d, s] = [Math.min(c + 1, columns - 1), Math.min(r + 1, rows - 1)];
  const [p, q] = [smooth(u - c), smooth(v - r)];
  return (1 - q) * ((1 - p) * grid[r][c] + p * grid[r][d]) + q * ((1 - p) * grid[s][c] + p * grid[s][d]);
}

const smooth = (t) => t * t * (3 - 2 * t);

export function draw(canvas, grid) {
  const side = 160;
  canvas.width = side;
  canvas.height = side;
  const peak = Math.max(...grid.flat()) || 1;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(side, side);
  for (let y = 0; y < side; y += 1) {
    for (let x = 0; x < side; x += 1) {
      const value = at(grid, (x + 0.5) / side, (y + 0.5) / side) / peak;
      const place = 4 * (y * side + x);
      pixels.data.set(colour(value), place);
      pixels.data[place + 3] = 50 + 155 * value;
    }
  }
  context.putImageData(pixels, 0, 0);
}
