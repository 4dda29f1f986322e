// The table of pairs: sorted, searched and paged in the browser; only the rows of one page are elements.
"use strict";

(async () => {
  const { load, element, numbered, contents } = dpoFastReport;
  const PAGE_ROWS = 50;
  const SHOWN_CHARACTERS = 90;
  const table = document.getElementById("pairs-table");
  const body = table.tBodies[0];
  const state = document.getElementById("pairs-state");
  const search = document.getElementById("search");
  const outcome = document.getElementById("outcome");
  const subset = document.getElementById("subset");
  const pageNumber = document.getElementById("page-number");
  const pageCount = document.getElementById("page-count");

  let pairs;
  try {
    pairs = await load("pairs");
  } catch (error) {
    state.textContent = error.message;
    return;
  }
  pairs.difference = pairs.chosenTokens.map((tokens, index) => tokens - pairs.rejectedTokens[index]);
  const positions = Uint32Array.from(pairs.row.keys());
  const excerpts = []; // [prompt, chosen, rejected] of each pair, as far as they are loaded
  const sorting = { column: "margin", descending: false }; // the worst first
  let order = positions; // all pairs, sorted
  let found = positions; // of these, what is searched for
  let page = 0;

  for (const [index, name] of pairs.subsets.entries()) subset.append(new Option(name, index));

  function sort() {
    const values = pairs[sorting.column];
    const sign = sorting.descending ? -1 : 1;
    order = positions.slice().sort((a, b) => sign * (values[a] - values[b]) || a - b);
    for (const header of table.querySelectorAll("th[data-column]")) {
      if (header.dataset.column !== sorting.column) header.removeAttribute("aria-sort");
      else header.setAttribute("aria-sort", sorting.descending ? "descending" : "ascending");
    }
  }

  function filter() {
    const words = search.value.trim();
    // A regular expression finds in either case without a copy of the text.
    const pattern = words && new RegExp(words.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"), "iu");
    found = order.filter((pair) => {
      if (outcome.value === "wrong" && pairs.margin[pair] > 0) return false;
      if (outcome.value === "right" && !(pairs.margin[pair] > 0)) return false;
      if (outcome.value === "truncated" && !pairs.truncated[pair]) return false;
      if (subset.value !== "" && pairs.subset[pair] !== Number(subset.value)) return false;
      if (!pattern) return true;
      if (String(pairs.row[pair]) === words) return true;
      if (pairs.subset.length && pattern.test(pairs.subsets[pairs.subset[pair]])) return true;
      return (excerpts[pair] ?? []).some((text) => pattern.test(text));
    });
    page = 0;
  }

  function draw() {
    const pages = Math.max(1, Math.ceil(found.length / PAGE_ROWS));
    page = Math.min(Math.max(page, 0), pages - 1);
    body.replaceChildren(...Array.from(found.slice(page * PAGE_ROWS, (page + 1) * PAGE_ROWS), rowOf));
    pageNumber.value = page + 1;
    pageNumber.max = pages;
    pageCount.textContent = pages.toLocaleString("en");
    for (const button of document.querySelectorAll("[data-step]")) {
      button.disabled = Number(button.dataset.step) < 0 ? page === 0 : page === pages - 1;
    }
    const all = pairs.row.length.toLocaleString("en");
    const shown = found.length === pairs.row.length ? `${all} pairs` : `${found.length.toLocaleString("en")} of ${all} pairs`;
    const missing = contents.excerptFiles && excerpts.length < pairs.row.length;
    state.textContent = missing ? `${shown}; texts are being loaded …` : shown;
  }

  function rowOf(pair) {
    const row = element("tr");
    const button = element("button", "open", String(pairs.row[pair]));
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    button.setAttribute("aria-label", `Row ${pairs.row[pair]}: texts and tokens`);
    button.addEventListener("click", () => toggle(row, button, pair));
    const first = element("th");
    first.scope = "row";
    first.append(button);
    row.append(first);
    const margin = cell(number(pairs.margin[pair]));
    margin.classList.add(pairs.margin[pair] > 0 ? "right" : "wrong");
    row.append(margin, cell(number(pairs.chosen[pair])), cell(number(pairs.rejected[pair])));
    for (const name of ["chosenTokens", "rejectedTokens", "difference"]) row.append(cell(withMinus(pairs[name][pair].toLocaleString("en"))));
    row.append(cell(pairs.truncated[pair] ? "yes" : ""));
    if (pairs.subsets.length) row.append(cell(pairs.subsets[pairs.subset[pair]], "name"));
    if (contents.excerptFiles) {
      const prompt = excerpts[pair]?.[0] ?? "…";
      row.append(cell(prompt.length > SHOWN_CHARACTERS ? `…${prompt.slice(-SHOWN_CHARACTERS)}` : prompt, "excerpt"));
    }
    return row;
  }

  function cell(text, className = "") {
    const made = element("td", className);
    const isolated = element("bdi", "", text); // text that runs the other way stays in its cell
    made.append(isolated);
    return made;
  }

  const withMinus = (text) => text.replace("-", "−");
  const number = (value) => withMinus(Number.isInteger(value) ? value.toFixed(1) : String(Number(value.toPrecision(4))));

  async function toggle(row, button, pair) {
    const wasOpen = button.getAttribute("aria-expanded") === "true";
    button.setAttribute("aria-expanded", String(!wasOpen));
    if (wasOpen) {
      row.nextElementSibling.remove();
      return;
    }
    const details = element("tr", "details");
    const content = element("td");
    content.colSpan = row.children.length;
    const frame = element("div", "frame", "loading …");
    content.append(frame);
    details.append(content);
    row.after(details);
    try {
      frame.replaceChildren(await dpoFastTokens.openPair(pair));
    } catch (error) {
      frame.textContent = error.message;
    }
  }

  function update() {
    filter();
    draw();
  }

  table.tHead.addEventListener("click", ({ target }) => {
    const name = target.closest("button")?.parentElement.dataset.column;
    if (!name) return;
    sorting.descending = sorting.column === name && !sorting.descending;
    sorting.column = name;
    sort();
    update();
  });
  let waiting;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(update, 150); // milliseconds without another key
  });
  for (const choice of [outcome, subset]) choice.addEventListener("change", update);
  for (const button of document.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => {
      page += Number(button.dataset.step);
      draw();
    });
  }
  pageNumber.addEventListener("change", () => {
    page = Number(pageNumber.value) - 1 || 0;
    draw();
  });

  sort();
  update();
  table.dataset.ready = "true";

  // The texts come after the numbers, a file at a time, so that the page answers in between.
  for (let file = 0; file < contents.excerptFiles; file++) {
    try {
      excerpts.push(...(await load(numbered("excerpts", file))));
    } catch (error) {
      state.textContent = error.message;
      return;
    }
    if (file === 0 || file === contents.excerptFiles - 1) {
      const opened = body.querySelector("[aria-expanded=true]");
      if (search.value.trim()) update();
      else if (!opened) draw();
    }
    await new Promise((resolve) => setTimeout(resolve));
  }
  table.dataset.texts = "true";
})();
