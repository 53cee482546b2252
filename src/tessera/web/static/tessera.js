// The chart and the state of the connection; htmx swaps everything else.
"use strict";

(() => {
  const NAMES = { train: "training", val: "validation", bigram: "bigram model", unigram: "unigram model" };
  const LINK = { connecting: "connecting", live: "live", lost: "reconnecting" };
  const body = document.body;
  const holder = document.getElementById("chart");
  const narrow = 560;
  let points = [];
  let across = { unigram: null, bigram: null, steps: 0 };
  let chart = null;
  let hovering = false;
  let drawing = 0;

  function setState(state) {
    if (body.dataset.state === state) return;
    body.dataset.state = state;
    document.getElementById("link-text").textContent = LINK[state];
  }

  // One polite sentence when the phase changes; figures that change all the time are not announced.
  function announcePhase() {
    const phases = document.getElementById("phases");
    const announce = document.getElementById("announce");
    if (phases && announce.dataset.phase !== phases.dataset.phase) {
      const first = announce.dataset.phase === undefined;
      announce.dataset.phase = phases.dataset.phase;
      if (!first) announce.textContent = `The run is now ${phases.dataset.phase}.`;
    }
  }

  function localTimes(root) {
    for (const time of root.querySelectorAll("time[datetime]")) {
      const at = new Date(time.dateTime);
      if (!Number.isNaN(at.getTime())) {
        time.title = at.toISOString();
        time.textContent = at.toLocaleTimeString(undefined, { hour12: false });
      }
    }
  }

  function columns() {
    const flat = (value) => points.map(() => value);
    const data = [points.map((p) => p[0]), points.map((p) => p[1]), points.map((p) => p[2]), flat(across.bigram), flat(across.unigram)];
    // The lines across reach to the end of the training that is still to come.
    const last = points.length ? points[points.length - 1][0] : 0;
    if (points.length && across.steps > last) {
      for (const [i, column] of data.entries()) column.push([across.steps, null, null, across.bigram, across.unigram][i]);
    }
    return data;
  }

  // The value at the cursor, or the newest one before it: evaluations are rare.
  function shown(u, _value, series, index) {
    if (index === null || index === undefined) return "–";
    for (let i = index; i >= 0; i--) {
      const value = u.data[series][i];
      if (value !== null && value !== undefined) return value.toFixed(3);
    }
    return "–";
  }

  function options() {
    const css = getComputedStyle(document.documentElement);
    const colour = (name) => css.getPropertyValue(name).trim();
    const font = `12px ${css.getPropertyValue("--sans").trim() || "sans-serif"}`;
    const axis = { stroke: colour("--quiet"), font, grid: { stroke: colour("--rule"), width: 1 }, ticks: { stroke: colour("--rule"), width: 1 } };
    const line = (key, width, dash) => ({ label: NAMES[key], stroke: colour(`--line-${key}`), width, dash, value: shown, points: { show: false }, spanGaps: true });
    return {
      width: holder.clientWidth,
      height: holder.clientWidth < narrow ? 240 : 320,
      legend: { markers: { width: 3 } },
      cursor: { y: false, drag: { x: false, y: false }, points: { size: 7 } },
      scales: { x: { time: false }, y: { range: (_u, low, high) => { const m = Math.max(0.05, (high - low) * 0.06); return [low - m, high + m]; } } },
      axes: [{ ...axis, size: 34, values: (_u, ticks) => ticks.map((t) => t.toLocaleString("en")) }, { ...axis, size: 48, values: (_u, ticks) => ticks.map((t) => t.toFixed(1)) }],
      series: [
        { label: "step", value: (_u, v) => (v === null || v === undefined ? "–" : v.toLocaleString("en")) },
        line("train", 1.25),
        { ...line("val", 2.5), points: { show: points.length < 400 ? undefined : false, size: 6 } },
        line("bigram", 1.5, [6, 5]),
        line("unigram", 1.5, [2, 4]),
      ],
      hooks: {
        setCursor: [(u) => { hovering = u.cursor.idx !== null && u.cursor.left >= 0; if (!hovering) showNewest(u); }],
      },
    };
  }

  function showNewest(u) {
    if (points.length) u.setLegend({ idx: points.length - 1 }, false);
  }

  function draw(fresh) {
    drawing = 0;
    if (!points.length) return;
    if (fresh && chart) { chart.destroy(); chart = null; }
    if (!chart) {
      holder.replaceChildren();
      chart = new uPlot(options(), columns(), holder);
      holder.dataset.drawn = "yes";
    } else {
      chart.setData(columns());
    }
    if (!hovering) showNewest(chart);
  }

  function drawSoon(fresh = false) {
    if (!drawing) drawing = requestAnimationFrame(() => draw(fresh));
  }

  function receive(event) {
    const update = JSON.parse(event.data);
    points = points.slice(0, update.from).concat(update.points);
    across = { unigram: update.unigram, bigram: update.bigram, steps: update.steps };
    drawSoon();
  }

  body.addEventListener("htmx:sseOpen", (event) => {
    points = [];
    event.detail.source.addEventListener("chart", receive);
  });
  body.addEventListener("htmx:sseError", () => setState("lost"));
  body.addEventListener("htmx:sseMessage", (event) => {
    setState("live");
    localTimes(event.target);
    if (event.target.dataset.testid === "status") announcePhase();
  });
  new ResizeObserver(() => {
    if (chart && chart.width !== holder.clientWidth) chart.setSize({ width: holder.clientWidth, height: holder.clientWidth < narrow ? 240 : 320 });
  }).observe(holder);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawSoon(true));
  localTimes(document);
  announcePhase();
})();
