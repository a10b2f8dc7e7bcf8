// The viewer: one view (centre as a fraction of the picture, scale) drives both panes.
(() => {
  const dialog = document.getElementById("viewer");
  if (!dialog) return;
  const data = JSON.parse(document.getElementById("viewer-data").textContent);
  const find = (selector) => dialog.querySelector(selector);
  const panes = [...dialog.querySelectorAll(".pane")];
  const [frame, cutter] = [find(".panes"), find(".cut")];
  const [pickA, pickB] = [find(".viewer-a"), find(".viewer-b")];
  // zoom: screen pixels (of the device) per image pixel.
  const view = { x: 0.5, y: 0.5, zoom: 1 };
  let [at, mode, cut, flipped] = [0, "side", 50, false];

  const item = () => data.items[at];
  const chosen = () => [pickA.value, pickB.value].map((name) => item().pictures[name]);
  const scale = () => view.zoom / devicePixelRatio;
  const sizeOf = () => (chosen().find(Boolean) ?? { size: [1, 1] }).size;
  const fitZoom = () => {
    const [width, height] = sizeOf();
    const box = panes[0].getBoundingClientRect();
    return Math.min(box.width / width, box.height / height) * devicePixelRatio;
  };

  function draw() {
    panes.forEach((pane, side) => {
      const picture = chosen()[side];
      const stage = pane.firstElementChild;
      if (!picture) return;
      const [width, height] = picture.size;
      const [paneWidth, paneHeight] = [pane.clientWidth, pane.clientHeight];
      const left = paneWidth / 2 - view.x * width * scale();
      const top = paneHeight / 2 - view.y * height * scale();
      stage.style.transform = `translate(${left.toFixed(2)}px, ${top.toFixed(2)}px) scale(${scale()})`;
      stage.classList.toggle("enlarged", view.zoom > 1.001);
      for (const image of stage.children) {
        const [x, y, w, h] = image.box;
        // Tiles of the whole are decoded once they are in sight and larger than the thumbnail.
        const inSight = left + (x + w) * scale() > 0 && top + (y + h) * scale() > 0
          && left + x * scale() < paneWidth && top + y * scale() < paneHeight;
        if (!image.src && inSight && (image.isSmall || view.zoom > 0.12)) {
          image.src = image.layer.p ? pictureUrl(image.layer.p) : image.layer.src;
        }
      }
    });
    frame.style.setProperty("--cut", `${cut}%`);
    cutter.setAttribute("aria-valuenow", String(Math.round(cut)));
    find(".viewer-zoom").textContent = `${(view.zoom * 100).toFixed(view.zoom < 1 ? 1 : 0)} %`;
    for (const button of dialog.querySelectorAll("[data-zoom]")) {
      const wanted = button.dataset.zoom === "fit" ? fitZoom() : Number(button.dataset.zoom);
      button.setAttribute("aria-pressed", String(Math.abs(wanted - view.zoom) < 1e-6));
    }
  }

  function build() {
    panes.forEach((pane, side) => {
      const name = [pickA, pickB][side].value;
      const picture = chosen()[side];
      pane.querySelector(".pane-name").textContent = picture ? `${"AB"[side]}  ${name}` : `${name}: no picture`;
      const stage = pane.firstElementChild;
      stage.replaceChildren();
      if (!picture) return;
      const [width, height] = picture.size;
      stage.style.width = `${width}px`;
      stage.style.height = `${height}px`;
      const whole = (layer) => layer.box[2] === width && layer.box[3] === height;
      for (const layer of picture.layers) {
        const image = document.createElement("img");
        const [x, y, w, h] = layer.box;
        Object.assign(image, { box: layer.box, layer, alt: "", draggable: false, decoding: "async" });
        image.isSmall = !layer.native || picture.layers.length <= 2;
        image.className = layer.native ? "native" : "reduced";
        image.classList.toggle("window", layer.native && !whole(layer) && picture.layers.length === 2);
        image.style.cssText = `left:${x}px;top:${y}px;width:${w}px;height:${h}px`;
        stage.append(image);
      }
    });
    const first = chosen().find(Boolean);
    const native = first ? first.layers.filter((layer) => layer.native) : [];
    const area = native.reduce((sum, layer) => sum + layer.box[2] * layer.box[3], 0);
    const isWhole = first && area >= first.size[0] * first.size[1];
    find(".viewer-note").textContent = !first ? "" : isWhole
      ? `${first.size.join(" × ")}, native pixels everywhere.`
      : `${first.size.join(" × ")}; native pixels inside the outline, a reduced copy around it.`;
    find(".viewer-title").textContent = `${item().id}  (${at + 1} of ${data.items.length})`;
    find(".viewer-prompt").textContent = item().title;
    for (const button of dialog.querySelectorAll("[data-mode]")) {
      button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
    }
    frame.dataset.mode = mode;
    cutter.hidden = mode !== "slider";
    frame.classList.toggle("flipped", flipped);
    draw();
  }

  function home() {
    // Start where the page has native pixels, at one image pixel per screen pixel.
    const picture = chosen().find(Boolean);
    const top = picture?.layers.filter((layer) => layer.native).at(-1);
    view.zoom = 1;
    [view.x, view.y] = [0.5, 0.5];
    if (top && picture.layers.length === 2) {
      const [x, y, w, h] = top.box;
      [view.x, view.y] = [(x + w / 2) / picture.size[0], (y + h / 2) / picture.size[1]];
    }
    if (Math.max(...sizeOf()) <= 512) view.zoom = Math.max(1, Math.floor(fitZoom()));
  }

  function open(id, systemA, systemB) {
    at = Math.max(0, data.items.findIndex((entry) => entry.id === id));
    if (systemA) pickA.value = systemA;
    if (systemB) pickB.value = systemB;
    if (!dialog.open) dialog.showModal();
    build();
    home();
    draw();
    frame.focus();
  }

  function zoomTo(zoom, focusX = 0, focusY = 0) {
    // The image point under (focusX, focusY), pixels from a pane's centre, stays where it is.
    const [width, height] = sizeOf();
    const before = scale();
    view.zoom = Math.min(32, Math.max(Math.min(fitZoom(), 1) * 0.5, zoom));
    view.x += (focusX / width) * (1 / before - 1 / scale());
    view.y += (focusY / height) * (1 / before - 1 / scale());
    keepInside();
    draw();
  }
  function pan(dx, dy) {
    const [width, height] = sizeOf();
    view.x -= dx / scale() / width;
    view.y -= dy / scale() / height;
    keepInside();
    draw();
  }
  function keepInside() {
    view.x = Math.min(1, Math.max(0, view.x));
    view.y = Math.min(1, Math.max(0, view.y));
  }
  function fit() {
    [view.x, view.y] = [0.5, 0.5];
    view.zoom = fitZoom();
    draw();
  }
  function step(by) {
    at = (at + by + data.items.length) % data.items.length;
    build();
    home();
    draw();
  }
  function setMode(wanted) {
    mode = wanted;
    flipped = false;
    build();
  }
  function swap() {
    [pickA.value, pickB.value] = [pickB.value, pickA.value];
    build();
  }
  function flip() {
    if (mode !== "flip") setMode("flip");
    flipped = !flipped;
    frame.classList.toggle("flipped", flipped);
  }
  function moveCut(to) {
    cut = Math.min(100, Math.max(0, to));
    draw();
  }

  for (const select of [pickA, pickB]) {
    select.append(...data.systems.map((name) => new Option(name, name)));
    select.addEventListener("change", build);
  }
  pickB.selectedIndex = Math.min(1, data.systems.length - 1);
  document.addEventListener("click", (event) => {
    const button = event.target.closest("button.open");
    if (!button) return;
    const system = button.dataset.system ?? data.systems[1] ?? data.systems[0];
    const other = button.dataset.against ?? data.systems.find((name) => name !== system) ?? system;
    pageIsComplete.then(() => open(button.dataset.item, other, system));
  });
  for (const button of dialog.querySelectorAll("[data-mode]")) {
    button.addEventListener("click", () => (button.dataset.mode === "flip" && mode === "flip"
      ? flip() : setMode(button.dataset.mode)));
  }
  for (const button of dialog.querySelectorAll("[data-zoom]")) {
    button.addEventListener("click", () => (
      button.dataset.zoom === "fit" ? fit() : zoomTo(Number(button.dataset.zoom))));
  }
  const acts = { previous: () => step(-1), next: () => step(1), swap, close: () => dialog.close() };
  for (const button of dialog.querySelectorAll("[data-act]")) {
    button.addEventListener("click", acts[button.dataset.act]);
  }
  frame.addEventListener("wheel", (event) => {
    event.preventDefault();
    const pane = event.target.closest(".pane") ?? panes[0];
    const box = pane.getBoundingClientRect();
    zoomTo(view.zoom * 2 ** (-event.deltaY / 240),
      event.clientX - box.left - box.width / 2, event.clientY - box.top - box.height / 2);
  }, { passive: false });
  let drag = null;
  frame.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    drag = { x: event.clientX, y: event.clientY, isCut: event.target === cutter };
    frame.setPointerCapture(event.pointerId);
  });
  frame.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const box = frame.getBoundingClientRect();
    if (drag.isCut) moveCut((100 * (event.clientX - box.left)) / box.width);
    else pan(event.clientX - drag.x, event.clientY - drag.y);
    [drag.x, drag.y] = [event.clientX, event.clientY];
  });
  for (const name of ["pointerup", "pointercancel"]) {
    frame.addEventListener(name, () => (drag = null));
  }
  const keys = {
    "+": () => zoomTo(view.zoom * 2), "=": () => zoomTo(view.zoom * 2),
    "-": () => zoomTo(view.zoom / 2), 0: fit, 1: () => zoomTo(1), " ": flip,
    n: () => step(1), p: () => step(-1), s: swap,
    ArrowLeft: () => pan(80, 0), ArrowRight: () => pan(-80, 0),
    ArrowUp: () => pan(0, 80), ArrowDown: () => pan(0, -80),
  };
  dialog.addEventListener("keydown", (event) => {
    const onControl = ["BUTTON", "SELECT", "INPUT"].includes(event.target.tagName);
    if (event.ctrlKey || event.metaKey || event.altKey || onControl) return;
    if (event.target === cutter && event.key.startsWith("Arrow")) {
      moveCut(cut + { ArrowLeft: -2, ArrowDown: -2, ArrowRight: 2, ArrowUp: 2 }[event.key]);
    } else if (keys[event.key]) keys[event.key]();
    else return;
    event.preventDefault();
  });
  window.addEventListener("resize", () => dialog.open && draw());
})();
