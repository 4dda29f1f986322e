// An opened pair: its prompt, and a heat map of each completion's tokens.
"use strict";

const dpoFastTokens = (() => {
  const { load, element, numbered, contents } = dpoFastReport;

  /** Everything about one pair, by its position in the run. */
  async function openPair(position) {
    const pairs = await load(numbered("tokens", Math.floor(position / contents.tokenPairs)));
    const pair = pairs[position % contents.tokenPairs];
    const opened = element("div", "opened");
    opened.append(element("h3", "", "Prompt"), textBlock(pair.prompt));
    const branches = element("div", "side-by-side");
    for (const name of ["chosen", "rejected"]) branches.append(heatMap(name, pair[name]));
    opened.append(branches);
    return opened;
  }

  function textBlock(text) {
    const block = element("div", "text", text);
    block.dir = "auto";
    return block;
  }

  function heatMap(name, { tokens, values }) {
    const section = element("section");
    const nats = values.map((value) => (value === null ? null : value / contents.perNat));
    const sum = nats.reduce((total, value) => total + (value ?? 0), 0);
    const heading = element("h3", "", name[0].toUpperCase() + name.slice(1));
    heading.append(element("small", "", ` ${contents.tokenValue} ${signed(sum)} nats over ${tokens.length} tokens`));
    const map = element("div", "text tokens");
    map.dir = "auto";
    map.tabIndex = 0;
    map.setAttribute("role", "group");
    map.setAttribute("aria-label", `Tokens of the ${name} completion; the arrow keys go through them`);
    map.append(...tokens.map((token, index) => tokenSpan(token, nats[index])));
    const readout = element("p", "readout", "Point at a token, or use the arrow keys.");
    readout.setAttribute("aria-live", "polite");
    let current = -1;
    const show = (index) => {
      map.children[current]?.classList.remove("current");
      current = index;
      map.children[current].classList.add("current");
      const value = nats[index] === null ? "not scored" : `${signed(nats[index])} nats`;
      readout.textContent = `token ${index + 1} of ${tokens.length}, ${JSON.stringify(tokens[index])}: ${value}`;
    };
    map.addEventListener("pointerover", ({ target }) => {
      if (target !== map) show([...map.children].indexOf(target));
    });
    map.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (!step || !tokens.length) return;
      event.preventDefault();
      show(Math.min(Math.max(current + step, 0), tokens.length - 1));
    });
    section.append(heading, map, readout);
    return section;
  }

  function tokenSpan(token, nats) {
    const span = element("span", "", token);
    if (token === "") span.classList.add("part"); // a part of the character that the next token completes
    if (token.includes("\n")) span.classList.add("line-end");
    if (nats === null) return span;
    span.classList.add(nats < 0 ? "down" : "up");
    span.style.setProperty("--strength", (0.75 * Math.min(Math.abs(nats) / contents.scale, 1)).toFixed(3));
    return span;
  }

  const signed = (number) => (number < 0 ? "−" : "+") + Math.abs(number).toFixed(2);

  return { openPair };
})();
