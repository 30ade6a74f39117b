// What the rounds of an answer brought: figures and two small plots.

const SVG = "http://www.w3.org/2000/svg";
const LAST = 60; // rounds in the plot of rounds

export class Speculation {
  constructor(levels) {
    this.levels = levels;
    this.rounds = []; // tokens of each round
    this.drafted = new Array(levels).fill(0); // rounds that drafted each position
    this.accepted = new Array(levels).fill(0); // rounds that accepted it
  }

  // Add a report: the text of each token, and how many positions were drafted and accepted.
  add({ pieces, drafted, accepted }) {
    if (drafted === 0 && accepted === 0 && this.rounds.length === 0 && !this.begun) {
      this.begun = performance.now(); // the prefill, whose token belongs to no round
      return;
    }
    this.rounds.push(pieces.length);
    for (let i = 0; i < drafted; i += 1) this.drafted[i] += 1;
    for (let i = 0; i < accepted; i += 1) this.accepted[i] += 1;
    this.ended = performance.now();
  }

  get tokens() { return sum(this.rounds); }
  get perRound() { return this.rounds.length ? this.tokens / this.rounds.length : NaN; }
  get rate() { return sum(this.accepted) / sum(this.drafted); }
  get speed() { return this.tokens / ((this.ended - this.begun) / 1000); }

  show() {
    write("figure-round", this.perRound, 2);
    write("figure-rate", 100 * this.rate, 0, "%");
    write("figure-speed", this.speed, 1);
    const shares = this.accepted.map((count, i) => (this.drafted[i] ? count / this.drafted[i] : NaN));
    document.getElementById("plot-positions").replaceChildren(positionsPlot(shares));
    document.getElementById("plot-rounds").replaceChildren(roundsPlot(this.rounds, Math.max(this.levels + 1, ...this.rounds)));
  }
}

function sum(numbers) { return numbers.reduce((a, b) => a + b, 0); }

function write(id, value, digits, unit = "") {
  document.getElementById(id).textContent = Number.isFinite(value) ? value.toFixed(digits) + unit : "–";
}

// A column for each position: how often it was accepted when it was drafted.
function positionsPlot(shares) {
  const spoken = shares.map((share, i) => `${i + 1}: ${percent(share)}`).join(", ");
  const plot = picture(300, 96, `Acceptance by position. ${spoken}`);
  const step = 300 / Math.max(shares.length, 1), width = Math.min(36, step * 0.62), height = 68;
  shares.forEach((share, i) => {
    const x = i * step + (step - width) / 2, tall = Number.isFinite(share) ? share * height : 0;
    rectangle(plot, "rest", x, 12, width, height);
    rectangle(plot, "bar", x, 12 + height - tall, width, tall);
    label(plot, x + width / 2, 92, i + 1);
    if (Number.isFinite(share)) label(plot, x + width / 2, 8, percent(share));
  });
  return plot;
}

// A thin column for each of the last rounds, up to the most tokens that a round can have.
function roundsPlot(rounds, most) {
  const shown = rounds.slice(-LAST);
  const plot = picture(300, 44, `The last ${shown.length} rounds had ${shown.join(", ")} tokens.`);
  const step = 300 / LAST;
  shown.forEach((tokens, i) => {
    const tall = (tokens / Math.max(most, 1)) * 40;
    rectangle(plot, "bar", i * step, 42 - tall, step - 1, tall);
  });
  const line = draw(plot, "line", { x1: 0, x2: 300, y1: 43, y2: 43 });
  line.setAttribute("class", "axis");
  return plot;
}

function percent(share) { return Number.isFinite(share) ? `${Math.round(100 * share)}%` : "–"; }

function picture(width, height, spoken) {
  const plot = document.createElementNS(SVG, "svg");
  plot.setAttribute("viewBox", `0 0 ${width} ${height}`);
  plot.setAttribute("role", "img");
  plot.setAttribute("aria-label", spoken);
  return plot;
}

function rectangle(plot, kind, x, y, width, height) {
  draw(plot, "rect", { x, y, width, height, rx: Math.min(3, width / 3), class: kind });
}

function label(plot, x, y, text) {
  draw(plot, "text", { x, y, "text-anchor": "middle" }).textContent = text;
}

function draw(plot, name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  plot.append(element);
  return element;
}
