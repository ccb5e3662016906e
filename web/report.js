// A report in a node: fixed-width text, as the server wrote it.

export function createReport(hint) {
  const element = document.createElement("pre");
  element.className = "lightforcing-report";
  element.style.cssText =
    "width:100%;height:100%;margin:0;padding:6px 8px;box-sizing:border-box;overflow:auto;" +
    "font:11px/1.45 ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre;" +
    "user-select:text;cursor:text;border-radius:4px;color:var(--input-text);background:var(--comfy-input-bg);";
  element.textContent = hint;
  // It is there to be copied from: dragging over it selects text and does not move the node.
  for (const kind of ["pointerdown", "mousedown"]) {
    element.addEventListener(kind, (event) => event.stopPropagation());
  }
  return {
    element,
    show(text) {
      element.textContent = text;
    },
    remove() {
      element.remove();
    },
  };
}
