// The front end of Light Forcing: growth curves, sliders that act in mid-run, frames as they come.

import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";
import { createCurve, percent } from "./curve.js";
import { allNodes, downstreamValues, graphId, upstreamValues, widgetValues } from "./graph.js";
import { askForecast, askFrames, askPresets, askRuns, sendSettings } from "./live.js";
import { createPlayer } from "./player.js";
import { createReport } from "./report.js";

const SPARSE = "LightForcingSparseAttention";
const STREAM = "LightForcingStreamVideo";
// Nodes with a report: what stands there before a run, and how wide and high it is in pixels.
const REPORTS = {
  LightForcingCompare: ["time, PSNR and SSIM appear here after a run", 360, 150],
  LightForcingBenchmark: ["frames per second and where the time goes appear here after a run", 780, 500],
};
const LOOK_EVERY = 120; // ms
const NODE_WIDTH = 360; // pixels, of a new node
const VIDEO_WIDGETS = ["width", "height", "length", "frames_per_chunk", "window_frames"];
const MODEL_WIDGETS = ["family", "model_name", "unet_name"];
const PLAYER_HEIGHT = 180; // pixels at least
const RUNS_KEY = "lightforcing.runs";
const RUNS_KEPT = 20;

// By node object, so that whatever is deleted is forgotten.
const curves = new WeakMap();
const players = new WeakMap();
const reports = new WeakMap();
let presets = {}; // widget values by preset

app.registerExtension({
  name: "lightforcing.live",

  nodeCreated(node) {
    if (node.comfyClass === SPARSE) addCurve(node);
    if (node.comfyClass === STREAM) addPlayer(node);
    if (REPORTS[node.comfyClass]) addReport(node, ...REPORTS[node.comfyClass]);
  },

  async setup() {
    api.addEventListener("lightforcing.start", ({ detail }) => {
      remember(detail.run_id);
      started(detail, true);
    });
    api.addEventListener("lightforcing.chunk", ({ detail }) => chunkDone(detail));
    api.addEventListener("lightforcing.frames", ({ detail }) => framesMade(detail));
    api.addEventListener("lightforcing.end", ({ detail }) => ended(detail));
    api.addEventListener("executed", ({ detail }) => executed(detail));
    api.addEventListener("reconnected", restore);
    const { ok, data } = await askPresets();
    if (ok) presets = data;
    // Looking at values finds every change: dragged, typed, undone, made in either kind of node.
    setInterval(look, LOOK_EVERY);
  },

  async afterConfigureGraph() {
    await restore();
  },
});

function addCurve(node) {
  const curve = createCurve();
  const state = {
    curve,
    forecast: null,
    askedFor: "",
    asking: false,
    marks: [],
    status: "",
    run: null, // { id, sent }: the run under way and the settings it was last sent
    sending: false,
    preset: "", // whose values the widgets were given
    plan: {}, // of the latest run: what no widget says
  };
  curves.set(node, state);
  addElement(node, "growth_curve", curve, () => curve.height);
}

function addPlayer(node) {
  const player = createPlayer(PLAYER_HEIGHT);
  const state = {
    player,
    run: null,
    marks: [],
    shown: -1, // number of the latest strip, so that none is shown twice
    waiting: null, // strips that came while earlier ones were fetched
  };
  players.set(node, state);
  state.widget = addElement(node, "frames_as_they_come", player, () => PLAYER_HEIGHT);
}

function addReport(node, hint, width, height) {
  const report = createReport(hint);
  reports.set(node, report);
  addElement(node, "report", report, () => height, width);
}

function addElement(node, name, part, height, width = NODE_WIDTH) {
  const widget = node.addDOMWidget(name, name, part.element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: height,
  });
  widget.serialize = false; // not in the workflow file either
  // A node of a workflow file gets the file's size after this.
  const [, least] = node.computeSize();
  node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], least)]);
  const removed = node.onRemoved;
  node.onRemoved = function (...rest) {
    part.remove();
    return removed?.apply(this, rest);
  };
  return widget;
}

// ---------------------------------------------------------------- settings that change

function look() {
  for (const [id, node] of allNodes()) {
    const state = curves.get(node);
    if (!state) continue;
    followPreset(node, state);
    const values = widgetValues(node);
    forecastFor(node, state, values);
    send(id, state, values);
  }
}

/**
 * A preset overrules the widgets it names. So that what they show is what holds, they are set when
 * one is chosen, and moving one of them afterwards chooses the custom preset.
 */
function followPreset(node, state) {
  const choice = node.widgets?.find((widget) => widget.name === "preset");
  const preset = presets[choice?.value];
  const ruled = preset ? node.widgets.filter((widget) => widget.name in preset) : [];
  if (preset && state.preset === choice.value) {
    if (ruled.some((widget) => widget.value !== preset[widget.name])) choice.value = "custom";
  } else {
    for (const widget of ruled) widget.value = preset[widget.name];
    node.setDirtyCanvas?.(true, true);
  }
  state.preset = choice?.value;
}

async function forecastFor(node, state, values) {
  if (state.asking) return;
  const video = { ...state.plan, ...videoOf(node) };
  const key = JSON.stringify([values, video]);
  if (key === state.askedFor) return;
  state.askedFor = key;
  state.asking = true;
  const { status, data } = await askForecast(values, video);
  state.asking = false;
  if (!status) state.askedFor = ""; // the server is away: ask again
  else state.forecast = data;
  redraw(state);
}

/** Model, length and size of the video that a node's model goes to, as far as widgets say. */
function videoOf(node) {
  const found = downstreamValues(node, VIDEO_WIDGETS);
  const { family, model_name, unet_name } = upstreamValues(node, MODEL_WIDGETS);
  const video = { family, model_name: model_name ?? unet_name };
  const whole = (value) => (Number.isInteger(value) && value > 0 ? value : undefined);
  if (whole(found.length)) video.frames = found.length;
  if (whole(found.frames_per_chunk)) video.frames_per_chunk = found.frames_per_chunk;
  if (whole(found.window_frames) || found.window_frames === -1) {
    video.window_frames = found.window_frames;
  }
  if (whole(found.width) && whole(found.height)) {
    video.frame_tokens = Math.floor(found.width / 16) * Math.floor(found.height / 16);
  }
  return video;
}

async function send(id, state, values) {
  if (!state.run || state.sending) return;
  const key = JSON.stringify(values);
  if (key === state.run.sent) return;
  const { run } = state;
  const isFirst = run.sent === null;
  run.sent = key;
  state.sending = true;
  const { ok, status, data } = await sendSettings(id, values);
  state.sending = false;
  if (status === 0) run.sent = null; // it never arrived: the next look at the sliders sends it again
  if (state.run !== run || status === 404) return; // over in the meantime
  if (isFirst && ok) return;
  state.status = ok ? `from chunk ${data.next_chunk + 1} on: as set now` : data.error;
  redraw(state);
}

function redraw(state) {
  state.curve.draw({ forecast: state.forecast, marks: state.marks, status: state.status });
}

// ---------------------------------------------------------------- runs

function* concerned(nodeIds, parts) {
  for (const [id, node] of allNodes()) {
    if (nodeIds.includes(id) && parts.has(node)) yield [id, node, parts.get(node)];
  }
}

/**
 * Which workflow each run belongs to, for this browser tab. Workflows share node ids, so a run must
 * not be picked up by whatever node has the same one in another workflow, or in another tab.
 */
function workflowsOfRuns() {
  return JSON.parse(sessionStorage.getItem(RUNS_KEY) ?? "{}");
}

function remember(runId) {
  const latest = Object.entries(workflowsOfRuns()).slice(1 - RUNS_KEPT);
  const runs = Object.fromEntries([...latest, [runId, graphId()]]);
  sessionStorage.setItem(RUNS_KEY, JSON.stringify(runs));
}

/** `isNew`: sliders may have moved since Run was pressed, so their values are sent once. */
function started(run, isNew) {
  for (const [, node, state] of concerned(run.node_ids, curves)) {
    state.run = { id: run.run_id, sent: isNew ? null : JSON.stringify(widgetValues(node)) };
    state.plan = forecastPlan(run.plan);
    state.marks = marksOf(run);
    state.status = "running";
    redraw(state);
  }
  for (const [, node, state] of concerned(run.node_ids, players)) {
    state.run = run.run_id;
    state.marks = marksOf(run);
    state.shown = -1;
    state.waiting = null;
    state.player.start(run.plan.frames_per_second);
    state.player.status("starting");
    showPlayer(node, state, true);
  }
}

/** The marks of a run so far, each at its chunk's index. */
function marksOf(run) {
  const marks = [];
  for (const mark of run.chunks) marks[mark.index] = mark;
  return marks;
}

/** What a run said about its video, for the next forecast. */
function forecastPlan(plan) {
  const { chunk_frames, given_frames, window_frames, frame_tokens, num_layers } = plan;
  return {
    frames_per_chunk: Math.max(...chunk_frames),
    given_frames,
    window_frames,
    frame_tokens,
    num_layers,
  };
}

function chunkDone(mark) {
  const speed = `chunk ${mark.index + 1} of ${mark.num_chunks} · ${mark.frames_per_second.toFixed(1)} frames/s`;
  for (const [, , state] of concerned(mark.node_ids, curves)) {
    if (state.run?.id !== mark.run_id) continue;
    state.marks[mark.index] = mark;
    state.status = `${speed} · computed ${percent(mark.density)}`;
    redraw(state);
  }
  for (const [, , state] of concerned(mark.node_ids, players)) {
    if (state.run !== mark.run_id) continue;
    state.marks[mark.index] = mark;
    state.player.status(speed);
  }
}

function framesMade(strip) {
  for (const [, , state] of concerned(strip.node_ids, players)) {
    if (state.run !== strip.run_id) continue;
    if (state.waiting) state.waiting.push(strip);
    else show(state, strip);
  }
}

function show(state, strip) {
  if (strip.number <= state.shown) return;
  state.shown = strip.number;
  state.player.add(strip);
}

function ended(run) {
  for (const [, , state] of concerned(run.node_ids, curves)) {
    if (state.run?.id !== run.run_id) continue;
    state.run = null;
    state.status = `${run.finished ? "" : "stopped; "}${summary(state.marks.filter(Boolean))}`;
    redraw(state);
  }
  for (const [, , state] of concerned(run.node_ids, players)) {
    if (state.run !== run.run_id) continue;
    state.run = null;
    state.player.status(`${run.finished ? "" : "stopped; "}${summary(state.marks.filter(Boolean))}`);
  }
}

function summary(marks) {
  if (!marks.length) return "no chunk was made";
  const frames = marks.reduce((sum, mark) => sum + mark.frames, 0);
  const seconds = marks.reduce((sum, mark) => sum + mark.seconds, 0);
  const many = marks.length === 1 ? "1 chunk" : `${marks.length} chunks`;
  return `${many}, ${frames} frames, ${(frames / seconds).toFixed(1)} frames/s`;
}

/** A node's output is there: its report, or the finished video, which the page itself plays. */
function executed({ node: nodeId, display_node: shown, output }) {
  const ids = [String(shown ?? nodeId)];
  for (const [, , report] of concerned(ids, reports)) report.show((output?.text ?? []).join("\n"));
  for (const [, node, state] of concerned(ids, players)) {
    showPlayer(node, state, false);
  }
}

/** Nodes on the canvas hide a widget by its flag, those made of HTML by the size of its element. */
function showPlayer(node, state, shown) {
  state.widget.hidden = !shown;
  state.player.collapse(!shown);
  node.setDirtyCanvas?.(true, true);
}

/** Pick up the runs under way: the page may have been loaded in the middle of one. */
async function restore() {
  const { ok, data } = await askRuns();
  if (!ok) return;
  const known = workflowsOfRuns();
  for (const run of data.runs) {
    if (known[run.run_id] !== graphId()) continue;
    started(run, false);
    const last = run.chunks.at(-1);
    if (last) chunkDone({ ...last, node_ids: run.node_ids, run_id: run.run_id });
    for (const [id, , state] of concerned(run.node_ids, players)) {
      state.waiting = [];
      const { ok: held, data: frames } = await askFrames(id);
      const strips = [...(held ? frames.strips : []), ...state.waiting];
      state.waiting = null;
      if (state.run === run.run_id) for (const strip of strips) show(state, strip);
    }
  }
}
