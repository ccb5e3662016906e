// The growth curve of a Sparse Attention node: what its settings will ask for, and what a run used.

const SVG = "http://www.w3.org/2000/svg";
const HEIGHT = 168; // pixels
const PLOT = { left: 38, right: 10, top: 12, bottom: 52 };
// These two stand out on light and dark nodes; all other colours are the theme's.
const CURVE = "#e0713c";
const KEPT = "#5b93d6";
const USED = "#3fae6b";

/** A picture that `draw` fills; its width is its container's. */
export function createCurve() {
  const element = document.createElement("div");
  element.className = "lightforcing-curve";
  element.style.cssText = `width:100%;height:${HEIGHT}px;overflow:hidden;box-sizing:border-box;`;
  const svg = make("svg", { width: "100%", height: HEIGHT });
  svg.style.cssText = "display:block;font-family:inherit;";
  element.append(svg);
  let shown = { forecast: null, marks: [], status: "" };
  const redraw = () => fill(svg, element.clientWidth, shown);
  const observer = new ResizeObserver(redraw);
  observer.observe(element);
  return {
    element,
    height: HEIGHT,
    /**
     * @param next.forecast answer of /lightforcing/forecast, or null
     * @param next.marks what each chunk of the latest run used and got
     * @param next.status a line about that run
     */
    draw(next) {
      shown = next;
      redraw();
    },
    remove() {
      observer.disconnect();
      element.remove();
    },
  };
}

function fill(svg, width, { forecast, marks, status }) {
  svg.replaceChildren();
  if (width < 80) return;
  const plot = {
    width: width - PLOT.left - PLOT.right,
    height: HEIGHT - PLOT.top - PLOT.bottom,
    x: (share) => PLOT.left + share * (width - PLOT.left - PLOT.right),
    y: (share) => PLOT.top + (1 - share) * (HEIGHT - PLOT.top - PLOT.bottom),
  };
  for (const tick of [0, 0.5, 1]) {
    const y = plot.y(tick);
    svg.append(
      make("line", { x1: plot.x(0), x2: plot.x(1), y1: y, y2: y, stroke: "var(--border-color)", "stroke-opacity": 0.6 }),
      text(`${100 * tick}%`, PLOT.left - 5, y + 3.5, "end"),
    );
  }
  if (!forecast) {
    if (status) svg.append(text(status, PLOT.left, HEIGHT - 8));
    return;
  }
  if (forecast.error) {
    svg.append(...wrapped(forecast.error, width));
    return;
  }
  const chunks = forecast.chunks;
  const step = 1 / chunks.length;
  const most = Math.max(...chunks.map((chunk) => chunk.visible_frames));
  chunks.forEach((chunk, index) => {
    const seen = chunk.visible_frames / most;
    const bar = (height, color, opacity) =>
      make("rect", {
        x: plot.x((index + 0.18) * step),
        width: Math.max(plot.width * step * 0.64, 0.5),
        y: plot.y(height),
        height: plot.height * height,
        fill: color,
        opacity,
      });
    const group = make("g");
    const title = make("title");
    title.textContent = tooltip(chunk, marks[index]);
    group.append(bar(seen, KEPT, 0.2), bar(seen * chunk.density, KEPT, 0.95), title);
    svg.append(group);
  });
  const points = chunks.map((chunk, i) => [plot.x((i + 0.5) * step), plot.y(chunk.sparsity)]);
  svg.append(
    make("polyline", {
      points: points.map((point) => point.join(",")).join(" "),
      fill: "none",
      stroke: CURVE,
      "stroke-width": 2,
      "stroke-linejoin": "round",
      class: "lightforcing-growth",
    }),
  );
  if (chunks.length <= 30) {
    for (const [cx, cy] of points) svg.append(make("circle", { cx, cy, r: 2.8, fill: CURVE }));
  }
  const every = Math.ceil(chunks.length / Math.max(Math.floor(plot.width / 26), 1));
  chunks.forEach((_, index) => {
    if (index % every) return;
    const label = text(index + 1, plot.x((index + 0.5) * step), plot.y(0) + 13, "middle");
    svg.append(label);
  });
  for (const mark of marks) {
    if (!mark || mark.index >= chunks.length) continue;
    const circle = make("circle", {
      cx: plot.x((mark.index + 0.5) * step),
      cy: plot.y(mark.sparsity),
      r: 4.4,
      fill: "none",
      stroke: USED,
      "stroke-width": 2,
      class: "lightforcing-mark",
    });
    circle.dataset.chunk = mark.index;
    circle.dataset.sparsity = mark.sparsity;
    svg.append(circle);
  }
  const plan = make("text", { x: PLOT.left, y: HEIGHT - 22, "font-size": 11 });
  plan.append(
    word("sparsity ", CURVE),
    word(`· computed ${percent(forecast.density)}`, KEPT),
    word(` · ${forecast.frames} frames, ${chunks.length} chunks`, "var(--descrip-text)"),
  );
  svg.append(plan);
  if (status) {
    const line = make("text", { x: PLOT.left, y: HEIGHT - 7, "font-size": 11 });
    const whole = make("title"); // what the node is too narrow for
    whole.textContent = status;
    line.append(word("○ ", USED), word(status, "var(--input-text)"), whole);
    line.classList.add("lightforcing-status");
    svg.append(line);
  }
}

function tooltip(chunk, mark) {
  const plan =
    `chunk ${chunk.index + 1}: ${percent(chunk.sparsity)} sparse, ` +
    `${percent(chunk.density)} of ${chunk.visible_frames} latent frames' pairs computed`;
  if (!mark) return plan;
  const used = `used ${percent(mark.sparsity)}, got ${percent(mark.density)}`;
  return `${plan}\n${used}, ${mark.seconds.toFixed(2)} s, ${mark.frames_per_second.toFixed(1)} frames/s`;
}

export function percent(share) {
  return `${(100 * share).toFixed(1)}%`;
}

function make(name, attributes = {}) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function text(content, x, y, anchor = "start") {
  const element = make("text", { x, y, "text-anchor": anchor, "font-size": 10 });
  element.style.fill = "var(--descrip-text)";
  element.textContent = content;
  return element;
}

function word(content, color) {
  const element = make("tspan");
  element.style.fill = color;
  element.textContent = content;
  return element;
}

/** An error over several lines, for SVG text does not wrap. */
function wrapped(message, width) {
  const letters = Math.max(Math.floor((width - PLOT.left - PLOT.right) / 5.6), 12);
  const lines = [""];
  for (const part of message.split(" ")) {
    if (lines.at(-1).length + part.length > letters) lines.push("");
    lines[lines.length - 1] += `${part} `;
  }
  return lines.slice(0, 6).map((line, index) => {
    const element = text(line, PLOT.left + 6, PLOT.top + 16 + 15 * index);
    element.style.fill = "var(--error-text)";
    return element;
  });
}
