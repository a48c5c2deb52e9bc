// Draws what was seen inside the layers from the numbers in #inside-data: heat maps and small multiples of what is chosen.
"use strict";
{
const ROW = 15, HEAD = 6, FOOT = 34, CURVE = 62, MOST_DIGITS = 44;
// Viridis, and blue to orange, dark at the page's colour: told apart by the colour-blind, too.
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
const SIGNED = { light: [[33, 102, 172], [247, 247, 247], [179, 88, 6]], dark: [[103, 169, 255], [36, 39, 43], [245, 160, 74]] };
const dark = window.matchMedia("(prefers-color-scheme: dark)");

function ramp(signed) {
  if (signed) return SIGNED[dark.matches ? "dark" : "light"];
  return dark.matches ? VIRIDIS : [...VIRIDIS].reverse();
}

function colour(share, stops) {
  const at = Math.min(Math.max(share, 0), 1) * (stops.length - 1), i = Math.min(Math.floor(at), stops.length - 2);
  return stops[i].map((low, k) => Math.round(low + (at - i) * (stops[i + 1][k] - low)));
}

const css = rgb => `rgb(${rgb.join(",")})`;
const ink = rgb => 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2] > 120 ? "#000" : "#fff";
const brief = layer => layer.replace(/^blocks\./, "");
const digits = value => value === null ? "none" : String(+value.toPrecision(3)).replace("-", "\u2212");

class Inside {
  constructor(root, data) {
    Object.assign(this, { root, data });
    this.select = name => root.querySelector(`select[data-choice=${name}]`);
    for (const name of ["quantity", "place", "against"])
      this.select(name).onchange = () => { this.fill(); this.draw(); };
    for (const button of root.querySelectorAll("[data-page]")) button.onclick = () => this.turn(button.dataset.page);
    const named = decodeURIComponent(location.hash.replace(/^#inside=?/, ""));
    this.turn(this.data.runs.some(run => run.name === named) ? named : data.runs.length > 1 ? "" : data.runs[0].name);
  }

  get shown() { return this.data.runs.filter(run => !this.page || run.name === this.page); }

  turn(page) {
    this.page = page;
    for (const button of this.root.querySelectorAll("[data-page]"))
      button.setAttribute("aria-pressed", String(button.dataset.page === page));
    this.fill();
    this.draw();
  }

  fill() {
    const quantities = Object.entries(this.data.quantities).filter(([key]) => this.shown.some(run => run.views[key]));
    const kinds = [...new Set(quantities.map(([, quantity]) => quantity.kind))];
    this.offer("quantity", kinds.map(kind => [kind, quantities.filter(([, q]) => q.kind === kind).map(([key, q]) => [key, q.title])]));
    this.key = this.select("quantity").value;
    const places = [...new Set(this.shown.flatMap(run => Object.keys(run.views[this.key] || {})))];
    this.offer("place", [["", places.map(place => [place, place])]]);
    this.place = this.select("place").value;
    const having = this.shown.filter(run => this.view(run));
    const how = this.data.quantities[this.key].signed ? "less" : "log2 of the ratio to";
    this.offer("against", [["", [["", "as it is"], ...having.map(run => [run.name, `${how} ${run.name}`])]]]);
    this.select("against").parentElement.hidden = having.length < 2;
    this.against = having.length < 2 ? "" : this.select("against").value;
  }

  offer(name, groups) {
    const select = this.select(name), before = select.value;
    select.replaceChildren();
    for (const [label, options] of groups) {
      const parent = label ? select.appendChild(Object.assign(document.createElement("optgroup"), { label })) : select;
      for (const [value, text] of options) parent.appendChild(new Option(text, value));
    }
    if ([...select.options].some(option => option.value === before)) select.value = before;
  }

  view(run) { return (run.views[this.key] || {})[this.place]; }

  // What is drawn of a run: {run, layers, steps, values, errors, marks}; of another run's only what both have.
  matrix(run) {
    const view = this.view(run), other = this.data.runs.find(one => one.name === this.against);
    if (!view) return null;
    if (!other) return this.trimmed({ run, layers: run.layers, ...view });
    const base = this.view(other), signed = this.data.quantities[this.key].signed;
    const steps = view.steps.filter(step => base.steps.includes(step));
    const values = run.layers.map((layer, i) => steps.map(step => {
      const row = base.values[other.layers.indexOf(layer)], a = view.values[i][view.steps.indexOf(step)];
      const b = row ? row[base.steps.indexOf(step)] : null;
      if (a === null || b === null) return null;
      return signed ? a - b : a > 0 && b > 0 ? Math.log2(a / b) : null;
    }));
    return this.trimmed({ run, layers: run.layers, steps, values });
  }

  trimmed(found) {
    const there = found.layers.map((_, i) => i).filter(i => found.values[i].some(value => value !== null));
    const pick = rows => rows && there.map(i => rows[i]);
    return { ...found, layers: pick(found.layers), values: pick(found.values), errors: pick(found.errors), marks: pick(found.marks) };
  }

  draw() {
    const quantity = this.data.quantities[this.key];
    const found = this.shown.filter(run => run.name !== this.against).map(run => this.matrix(run)).filter(one => one && one.layers.length && one.steps.length);
    const values = found.flatMap(one => one.values.flat()).filter(value => value !== null);
    const signed = quantity.signed || this.against !== "";
    this.scale = scaleOf(values, signed);
    this.meaning(quantity);
    const maps = this.root.querySelector(".maps"), many = this.root.querySelector(".multiples");
    maps.replaceChildren(); many.replaceChildren();
    this.legend(this.root.querySelector(".legend"), values, signed);
    this.keys(found);
    // All figures first: each is as wide as there is room beside the others.
    const figures = found.map(() => maps.appendChild(document.createElement("figure")));
    found.forEach((one, i) => new Heat(this, figures[i], one, quantity));
    for (const layer of new Set(found.flatMap(one => one.layers))) this.curve(many, layer, found);
    if (!found.length) maps.textContent = "These runs have no step and layer in common.";
  }

  meaning(quantity) {
    const marked = quantity.mark && !this.against ? ` A dot: ${quantity.mark}.` : "";
    this.root.querySelector(".meaning").textContent = `${quantity.title}: ${quantity.meaning}.${marked}`;
  }

  legend(figure, values, signed) {
    const width = Math.min(figure.clientWidth, 420);
    figure.replaceChildren();
    if (!values.length) return;
    const svg = element(figure, "svg", { width, height: 40, viewBox: `0 0 ${width} 40`, role: "img", "aria-label": "scale of the colours" });
    const stops = ramp(signed), parts = 48;
    for (let i = 0; i < parts; i++)
      element(svg, "rect", { x: i / parts * width, y: 0, width: width / parts + 0.5, height: 14, fill: css(colour(i / (parts - 1), stops)) });
    for (const [share, anchor] of [[0, "start"], [0.5, "middle"], [1, "end"]])
      element(svg, "text", { x: share * width, y: 28, "text-anchor": anchor }, digits(this.scale.back(share)));
  }

  keys(found) {
    const row = this.root.querySelector(".lines");
    row.replaceChildren();
    for (const { run } of found) {
      const item = row.appendChild(document.createElement("span"));
      const svg = element(item, "svg", { width: 26, height: 10 });
      element(svg, "line", { x2: 26, y1: 5, y2: 5, class: `thick s${run.colour}`, "stroke-dasharray": run.dash });
      item.append(` ${run.name}`);
    }
    const among = found.length === 1 ? " this layer; thin: the others." : "";
    if (found.length) row.append(`${among} Each from ${digits(this.scale.back(0))} to ${digits(this.scale.back(1))}.`);
  }

  // One layer's curves over steps: of each run, or of one run among its other layers.
  curve(parent, layer, found) {
    const figure = parent.appendChild(document.createElement("figure"));
    figure.appendChild(document.createElement("figcaption")).textContent = brief(layer);
    const width = Math.max(figure.clientWidth, 80), steps = found.flatMap(one => one.steps);
    const svg = element(figure, "svg", { width, height: CURVE, viewBox: `0 0 ${width} ${CURVE}`, role: "img", "aria-label": `${layer}: curves` });
    const [first, last] = [Math.min(...steps), Math.max(...steps)], logs = last > 30 * first && first > 0;
    const place = step => logs ? Math.log(step) : step;
    const x = step => 3 + (last > first ? (place(step) - place(first)) / (place(last) - place(first)) : 0.5) * (width - 6);
    const y = value => CURVE - 4 - this.scale.share(value) * (CURVE - 8);
    const line = (one, i, name) => {
      const points = one.steps.map((step, k) => [x(step), one.values[i][k]]).filter(([, value]) => value !== null);
      element(svg, "polyline", { points: points.map(([at, value]) => `${at.toFixed(1)},${y(value).toFixed(1)}`).join(" "), class: name, "stroke-dasharray": name === "others" ? "" : one.run.dash });
      if (points.length === 1 && name !== "others") element(svg, "circle", { cx: points[0][0], cy: y(points[0][1]), r: 2, class: name });
    };
    if (this.scale.signed) element(svg, "line", { x1: 0, x2: width, y1: y(0), y2: y(0), class: "zero" });
    if (found.length === 1) found[0].layers.forEach((_, i) => line(found[0], i, "others"));
    for (const one of found) {
      const i = one.layers.indexOf(layer);
      if (i < 0) continue;
      if (one.errors) one.steps.forEach((step, k) => {
        const [value, error] = [one.values[i][k], one.errors[i][k]];
        if (value !== null && error !== null)
          element(svg, "line", { x1: x(step), x2: x(step), y1: y(value - error), y2: y(value + error), class: `thick s${one.run.colour}` });
      });
      line(one, i, `thick s${one.run.colour}`);
    }
  }
}

// Shares of the colours' range: around 0 where signs mean something, logarithmic where sizes are far apart.
function scaleOf(values, signed) {
  const sizes = values.map(Math.abs).sort((a, b) => a - b), top = sizes.at(-1) || 1;
  if (signed) {
    const most = sizes[Math.floor(0.98 * (sizes.length - 1))] || top; // one outlier would make the rest one colour
    return { signed, share: value => clamp(0.5 + value / most / 2), back: share => (2 * share - 1) * most };
  }
  const low = Math.min(...values), positive = sizes[0] > 0;
  if (positive && top > 20 * low)
    return { signed, share: value => clamp(Math.log(value / low) / Math.log(top / low)), back: share => low * (top / low) ** share };
  const room = top - low || Math.abs(top) || 1;
  return { signed, share: value => clamp((value - low) / room), back: share => low + share * room };
}

const clamp = share => Math.min(Math.max(share, 0), 1);

class Heat {
  constructor(inside, figure, found, quantity) {
    Object.assign(this, { inside, found, row: 0, column: found.steps.length - 1 });
    figure.className = "map";
    figure.appendChild(document.createElement("figcaption")).textContent = found.run.name;
    const width = figure.clientWidth, left = width < 420 ? 88 : 104, { layers, steps } = found;
    this.cell = (width - left - 2) / steps.length;
    this.left = left;
    const height = HEAD + layers.length * ROW + FOOT;
    const title = `${found.run.name}: ${quantity.title}, ${inside.place}, ${layers.length} layers by ${steps.length} steps`;
    this.svg = element(figure, "svg", { width, height, viewBox: `0 0 ${width} ${height}`, tabindex: 0, role: "application", "aria-label": title });
    const stops = ramp(inside.scale.signed);
    layers.forEach((layer, i) => {
      element(this.svg, "text", { x: left - 5, y: HEAD + (i + 0.5) * ROW + 4, "text-anchor": "end" }, brief(layer));
      steps.forEach((_, k) => this.box(i, k, stops));
    });
    let free = -1;
    steps.forEach((step, k) => {
      const at = left + (k + 0.5) * this.cell, half = String(step).length * 3.5 + 3;
      if (at - half < free) return;
      free = at + half;
      element(this.svg, "text", { x: at, y: HEAD + layers.length * ROW + 14, "text-anchor": "middle" }, String(step));
    });
    element(this.svg, "text", { x: width - 2, y: height - 6, "text-anchor": "end" }, "step");
    this.frame = element(this.svg, "rect", { class: "picked", width: this.cell, height: ROW, x: -9999, y: 0 });
    this.svg.onkeydown = event => this.key(event);
    this.svg.onfocus = () => this.pick(this.row, this.column);
    this.svg.onblur = () => this.frame.setAttribute("x", -9999);
  }

  box(i, k, stops) {
    const value = this.found.values[i][k], x = this.left + k * this.cell, y = HEAD + i * ROW;
    const rgb = value === null ? null : colour(this.inside.scale.share(value), stops);
    const inset = value === null ? 1 : 0;
    const rect = element(this.svg, "rect", { x: x + inset, y: y + inset, width: this.cell - 1 - inset, height: ROW - 1 - inset, class: rgb ? "cell" : "missing", ...(rgb ? { fill: css(rgb) } : {}) });
    rect.onpointerenter = rect.onclick = () => this.pick(i, k);
    const marked = this.found.marks && this.found.marks[i][k];
    if (rgb && this.cell >= MOST_DIGITS)
      element(this.svg, "text", { x: x + this.cell / 2, y: y + 11, "text-anchor": "middle", class: "value", style: `color:${ink(rgb)}` }, digits(value));
    if (marked) element(this.svg, "circle", { cx: x + (this.cell >= MOST_DIGITS ? 6 : this.cell / 2), cy: y + 7, r: 3, class: "dot" });
  }

  key(event) {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!move) return;
    event.preventDefault();
    this.pick(this.row + move[0], this.column + move[1]);
  }

  pick(row, column) {
    const { layers, steps, values, errors, run } = this.found;
    this.row = Math.min(Math.max(row, 0), layers.length - 1);
    this.column = Math.min(Math.max(column, 0), steps.length - 1);
    this.frame.setAttribute("x", this.left + this.column * this.cell - 0.5);
    this.frame.setAttribute("y", HEAD + this.row * ROW - 0.5);
    const [value, error] = [values, errors].map(rows => rows ? rows[this.row][this.column] : null);
    const beside = error === null ? "" : ` \u00b1 ${digits(error)}`;
    this.inside.root.querySelector(".said").textContent = `${run.name}, ${layers[this.row]}, step ${steps[this.column].toLocaleString("en")}: ${digits(value)}${beside}`;
  }
}

const inside = new Inside(document.getElementById("inside"), JSON.parse(document.getElementById("inside-data").textContent));
let wide = window.innerWidth;
const again = () => { if (window.innerWidth !== wide) { wide = window.innerWidth; inside.draw(); } };
window.addEventListener("resize", again);
dark.addEventListener("change", () => inside.draw());
}
