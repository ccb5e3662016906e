// Plays frames while they are made: strips of JPEG frames on a canvas.

const MOST_FRAMES = 320; // held in memory, up to 0.6 MB each; the oldest go first

/** A canvas with a line of text below it, so many pixels high at least. */
export function createPlayer(height) {
  const element = document.createElement("div");
  element.className = "lightforcing-player";
  element.style.cssText =
    "width:100%;height:100%;display:flex;flex-direction:column;gap:4px;overflow:hidden;box-sizing:border-box;";
  const canvas = document.createElement("canvas");
  canvas.style.cssText =
    "flex:1 1 0;min-height:0;width:100%;object-fit:contain;border-radius:4px;background:var(--comfy-input-bg);";
  canvas.width = 16;
  canvas.height = 9;
  const line = document.createElement("div");
  line.className = "lightforcing-player-status";
  line.style.cssText =
    "flex:none;font-size:11px;line-height:16px;color:var(--input-text);white-space:nowrap;overflow:hidden;text-overflow:ellipsis;";
  line.textContent = "frames appear here while they are made";
  element.append(canvas, line);

  element.style.minHeight = `${height}px`;

  let frames = []; // { image, top, width, height }
  let at = 0;
  let looping = false; // all there is has been shown once
  let rate = 16;
  let timer = 0;
  let generation = 0;
  let reading = Promise.resolve(); // strips are read one after the other, or they could change places

  function show() {
    if (!frames.length) return;
    if (at >= frames.length) {
      at = 0;
      looping = true;
    }
    const { image, top, width, height } = frames[at];
    if (canvas.width !== width || canvas.height !== height) {
      canvas.width = width;
      canvas.height = height;
    }
    canvas.getContext("2d").drawImage(image, 0, top, width, height, 0, 0, width, height);
    canvas.dataset.frame = at;
    at += 1;
  }

  function play() {
    if (timer) return;
    timer = setInterval(show, 1000 / rate);
  }

  function pause() {
    clearInterval(timer);
    timer = 0;
  }

  /** Drop the first frames, and strips of which none is left. */
  function forget(count) {
    const old = new Set(frames.slice(0, count).map((frame) => frame.image));
    frames = frames.slice(count);
    for (const { image } of frames) old.delete(image);
    for (const image of old) image.close();
  }

  function append(strip, image) {
    if (looping) at = frames.length;
    looping = false;
    for (let index = 0; index < strip.frames; index++) {
      const { width, height } = strip;
      frames.push({ image, top: index * height, width, height });
    }
    const gone = frames.length - MOST_FRAMES;
    if (gone > 0) {
      forget(gone);
      at = Math.max(at - gone, 0);
    }
    play();
  }

  return {
    element,
    canvas,
    /** Leave the line of text alone, or show all again. */
    collapse(collapsed) {
      if (collapsed) pause();
      canvas.style.display = collapsed ? "none" : "block";
      element.style.minHeight = collapsed ? "0" : `${height}px`;
    },
    status(message) {
      line.textContent = message;
    },
    /** Forget what was shown; frames of an earlier run that are still being read are dropped. */
    start(framesPerSecond) {
      pause();
      generation += 1;
      forget(frames.length);
      at = 0;
      looping = false;
      rate = framesPerSecond || 16;
    },
    /** The next frames, { jpeg: base64, frames, width, height }; they play at once. */
    add(strip) {
      const mine = generation;
      const read = async () => {
        const image = await createImageBitmap(new Blob([bytes(strip.jpeg)], { type: "image/jpeg" }));
        if (mine === generation) append(strip, image);
        else image.close();
      };
      reading = reading
        .then(read)
        .catch((error) => console.error("Light Forcing: frames could not be shown", error));
    },
    remove() {
      pause();
      generation += 1;
      forget(frames.length);
      element.remove();
    },
  };
}

function bytes(base64) {
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}
