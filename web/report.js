// A report in a node: fixed-width text, as the server wrote it.

export function createReport(hint) {
  const element = document.createElement("pre");
  element.className = "lightforcing-report";
  element.style.cssText =
    "width:100%;height:100%;margin:0;padding:6px 8px;box-sizing:border-box;overflow:auto;" +
    "font:11px/1.45 ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;white-space:pre;" +
    "border-radius:4px;color:var(--input-text);background:var(--comfy-input-bg);";
  element.textContent = hint;
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
