// Reading the graph: nodes and their ids as the server knows them, widgets, what a node leads to.

import { app } from "../../scripts/app.js";

function rootGraph() {
  return app.rootGraph ?? app.graph;
}

/** Which workflow is open; the same after the page was loaded again. */
export function graphId() {
  return rootGraph()?.id ?? "";
}

/** Every node with the id it has on the server; nodes of a subgraph are "outer:inner" there. */
export function* allNodes(graph = rootGraph(), prefix = "") {
  for (const node of graph?.nodes ?? graph?._nodes ?? []) {
    const id = `${prefix}${node.id}`;
    yield [id, node];
    if (node.subgraph) yield* allNodes(node.subgraph, `${id}:`);
  }
}

/** The widgets whose values go to the server, by name. */
export function widgetValues(node) {
  const values = {};
  for (const widget of node.widgets ?? []) {
    if (widget.options?.serialize === false || widget.serialize === false) continue;
    values[widget.name] = linkedValue(node, widget.name) ?? widget.value;
  }
  return values;
}

/** The value of a primitive node that feeds a widget; other nodes' values are known when they run. */
function linkedValue(node, name) {
  const input = node.inputs?.find((slot) => slot.widget?.name === name);
  if (input?.link == null) return undefined;
  const source = node.graph?.getNodeById(link(node.graph, input.link)?.origin_id);
  return source?.type?.startsWith("Primitive") ? source.widgets?.[0]?.value : undefined;
}

function link(graph, id) {
  return graph.getLink?.(id) ?? graph.links?.get?.(id) ?? graph.links?.[id];
}

function* targets(node) {
  for (const output of node.outputs ?? []) {
    for (const id of output.links ?? []) {
      const target = node.graph?.getNodeById(link(node.graph, id)?.target_id);
      if (target) yield target;
    }
  }
}

function* sources(node) {
  for (const input of node.inputs ?? []) {
    if (input.link == null) continue;
    const source = node.graph?.getNodeById(link(node.graph, input.link)?.origin_id);
    if (source) yield source;
  }
}

/**
 * The values of these widget names on the nodes that `node` leads to, and on what feeds them:
 * a sampler, its latent. The nearest node wins.
 */
export function downstreamValues(node, names) {
  const found = {};
  const read = (other) => readWidgets(other, names, found);
  const seen = new Set([node]);
  const queue = [node];
  while (queue.length) {
    for (const target of targets(queue.shift())) {
      if (seen.has(target)) continue;
      seen.add(target);
      queue.push(target);
      read(target);
      for (const source of sources(target)) if (!seen.has(source)) read(source);
    }
  }
  return found;
}

/** The values of these widget names on the nodes that lead to `node`; the nearest wins. */
export function upstreamValues(node, names) {
  const found = {};
  const seen = new Set([node]);
  const queue = [node];
  while (queue.length) {
    for (const source of sources(queue.shift())) {
      if (seen.has(source)) continue;
      seen.add(source);
      queue.push(source);
      readWidgets(source, names, found);
    }
  }
  return found;
}

function readWidgets(node, names, found) {
  for (const { name, value } of node.widgets ?? []) {
    if (names.includes(name) && !(name in found)) found[name] = value;
  }
}
