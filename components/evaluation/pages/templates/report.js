"use strict";
// Pictures lie as base64 in data blocks at the end of the page; each is decoded when first needed.
const pageIsComplete = new Promise((resolve) => {
  if (document.readyState === "loading") {
    document.addEventListener("DOMContentLoaded", resolve, { once: true });
  } else resolve();
});
const pictureUrls = new Map();
function pictureUrl(id) {
  if (!pictureUrls.has(id)) {
    const block = document.getElementById(id);
    const text = atob(block.textContent);
    const bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
    pictureUrls.set(id, URL.createObjectURL(new Blob([bytes], { type: block.type })));
  }
  return pictureUrls.get(id);
}
function fill(image) {
  image.decoding = "async";
  image.src = pictureUrl(image.dataset.picture);
  delete image.dataset.picture;
}
pageIsComplete.then(() => {
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      near.unobserve(entry.target);
      fill(entry.target);
    }
  }, { rootMargin: "300px" });
  for (const image of document.querySelectorAll("img[data-picture]")) near.observe(image);
  window.addEventListener("beforeprint", () => {
    document.querySelectorAll("img[data-picture]").forEach(fill);
  });
});

for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const isNumber = button.dataset.sort === "number";
      const keyed = [...table.tBodies[0].rows].map((row) => {
        const cell = row.cells[column];
        const text = cell.dataset.value ?? cell.textContent;
        return { row, missing: text === "", key: isNumber ? Number(text) : text };
      });
      keyed.sort((a, b) => {
        // Cells without a value stay at the end in both directions.
        if (a.missing || b.missing) return a.missing - b.missing;
        const order = isNumber ? a.key - b.key : a.key.localeCompare(b.key, "en", { numeric: true });
        return up ? order : -order;
      });
      table.tBodies[0].append(...keyed.map((entry) => entry.row));
    });
  });
}
for (const block of document.querySelectorAll(".filtered")) {
  const rows = [...block.querySelectorAll("tbody tr")];
  const words = block.querySelector(".filter-text");
  const system = block.querySelector(".filter-system");
  const shown = block.querySelector(".shown");
  const texts = rows.map((row) => (row.textContent + " " + (row.dataset.detail ?? "")).toLowerCase());
  const apply = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    rows.forEach((row, at) => {
      const kept = wanted.every((word) => texts[at].includes(word))
        && (!system?.value || row.dataset.system === system.value);
      row.hidden = !kept;
      count += kept;
    });
    shown.textContent = count === rows.length ? `${count} rows` : `${count} of ${rows.length} rows`;
  };
  words.addEventListener("input", apply);
  system?.addEventListener("change", apply);
}
