"""What developers run beside a genuine ComfyUI: the demo, a page to try, the tests' server."""
