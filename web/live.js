// What the pack asks its server. Every answer is { ok, status, data }; a lost server is { ok: false }.

import { api } from "../../scripts/api.js";

async function ask(path, body) {
  const options = body && {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
  };
  try {
    const answer = await api.fetchApi(`/lightforcing/${path}`, options);
    return { ok: answer.ok, status: answer.status, data: await answer.json() };
  } catch (error) {
    return { ok: false, status: 0, data: { error: String(error) } };
  }
}

/** What these settings will ask for and compute, chunk by chunk. */
export const askForecast = (values, video) => ask("forecast", { values, ...video });

/** Values of a Sparse Attention node's widgets by preset. */
export const askPresets = () => ask("presets");

/** Move the sliders of a running node. */
export const sendSettings = (nodeId, values) => ask("live", { node_id: nodeId, values });

/** The runs under way, after a page was loaded again. */
export const askRuns = () => ask("live");

/** The latest frames of a running node. */
export const askFrames = (nodeId) => ask(`frames?node_id=${encodeURIComponent(nodeId)}`);
