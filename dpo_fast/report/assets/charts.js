// The figures: Plotly draws them, in the page's colours, after the table is there.
"use strict";

(async () => {
  const { load } = dpoFastReport;
  const places = [...document.querySelectorAll("[data-chart]")];
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const config = { responsive: true, displaylogo: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"] };

  /** What a figure takes from the page, under Plotly's names. */
  function theme() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue(name).trim();
    const axes = {};
    for (const axis of ["xaxis", "yaxis"]) {
      axes[`${axis}.gridcolor`] = of("--line");
      axes[`${axis}.linecolor`] = of("--line");
    }
    return {
      ...axes,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      "font.color": of("--text"),
      "font.family": "system-ui, sans-serif",
      "font.size": 12,
      "hoverlabel.bgcolor": of("--raised"),
      "hoverlabel.font.color": of("--text"),
    };
  }

  function script(source) {
    return new Promise((resolve, reject) => {
      const made = document.createElement("script");
      made.src = source;
      made.addEventListener("load", resolve);
      made.addEventListener("error", () => reject(new Error(`${source} could not be read: keep report.html and the folder report together`)));
      document.head.append(made);
    });
  }

  await load("pairs").catch(() => {});
  await new Promise((resolve) => setTimeout(resolve)); // the table first
  let figures;
  try {
    [figures] = await Promise.all([load("figures"), script("report/plotly.min.js")]);
  } catch (error) {
    for (const place of places) place.textContent = error.message;
    return;
  }
  for (const place of places) {
    const { data, layout } = figures[place.dataset.chart];
    await Plotly.newPlot(place, data, layout, config);
    await Plotly.relayout(place, theme());
    place.dataset.drawn = "true";
    await new Promise((resolve) => setTimeout(resolve));
  }
  document.body.dataset.figures = "drawn";
  dark.addEventListener("change", () => places.forEach((place) => Plotly.relayout(place, theme())));
})();
