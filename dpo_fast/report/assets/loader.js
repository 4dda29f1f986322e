// Data files are scripts that call `dpoFastReport.receive(name, value)`: of all that a browser reads from a folder of
// the disk, scripts alone may be read by a page.
"use strict";

const dpoFastReport = (() => {
  const loading = new Map(); // by name: the promise of the file's value, and what settles it

  /** The value of a data file, loaded once. */
  function load(name) {
    if (!loading.has(name)) {
      const entry = Promise.withResolvers ? Promise.withResolvers() : resolvers();
      loading.set(name, entry);
      const script = document.createElement("script");
      script.src = `report/data/${name}.js`;
      script.addEventListener("error", () => {
        loading.delete(name); // so that it can be tried again
        entry.reject(new Error(`${script.src} could not be read: keep report.html and the folder report together`));
      });
      script.addEventListener("load", () => script.remove());
      document.head.append(script);
    }
    return loading.get(name).promise;
  }

  /** What a data file calls. */
  function receive(name, value) {
    loading.get(name)?.resolve(value);
  }

  function resolvers() {
    const entry = {};
    entry.promise = new Promise((resolve, reject) => Object.assign(entry, { resolve, reject }));
    return entry;
  }

  /** An element with a class and a text; never HTML, for the text comes from data. */
  function element(tag, className = "", text = "") {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text) made.textContent = text;
    return made;
  }

  /** The name of one of several files, which are numbered with five digits. */
  const numbered = (name, number) => `${name}-${String(number).padStart(5, "0")}`;

  return { load, receive, element, numbered, contents: JSON.parse(document.getElementById("contents").textContent) };
})();
