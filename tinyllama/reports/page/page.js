"use strict";
// The charts of a report. The numbers are in #data: per run, columns of base64 float32, one value
// per step, NaN where nothing was measured.
(() => {
  const LIGHT = ["#2457d6", "#d9480f", "#2b8a3e", "#9c36b5", "#0c8599", "#c2255c", "#e67700", "#5f3dc4"];
  const DARK = ["#7aa2ff", "#ff9d66", "#69db7c", "#da9bf0", "#3bc9db", "#faa2c1", "#ffd43b", "#b197fc"];
  const AXES = { step: "optimizer step", tokens: "tokens", seconds: "training time" };
  const POWERS = Array.from({ length: 50 }, (_, i) => 2 ** i);
  const byId = (id) => document.getElementById(id);
  const state = { axis: "step", smoothing: 0.9, theme: "auto", log: {}, hidden: new Set(), range: null };
  let data = JSON.parse(byId("data").textContent);
  let runs = [];
  const charts = new Map();

  function decode(text) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  }

  function load() {
    runs = data.runs.map((run) => {
      const columns = {};
      for (const [name, text] of Object.entries(run.columns)) columns[name] = decode(text);
      return { ...run, columns };
    });
  }

  // ---- numbers as people read them

  const digits = (value, places) => value.toLocaleString("en", { maximumFractionDigits: places });
  function short(value) {
    if (value == null || Number.isNaN(value)) return "–";
    const size = Math.abs(value);
    if (size >= 1e9) return digits(value / 1e9, 2) + " G";
    if (size >= 1e6) return digits(value / 1e6, 2) + " M";
    if (size >= 1e4) return digits(value / 1e3, 1) + " k";
    if (size >= 100) return digits(value, 1);
    if (size >= 0.01 || size === 0) return digits(value, 4);
    return value.toExponential(2);
  }
  function bytes(value) {
    if (value == null || Number.isNaN(value)) return "–";
    for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 1024]])
      if (Math.abs(value) >= size) return digits(value / size, 2) + " " + unit;
    return digits(value, 0) + " B";
  }
  function clock(value) {
    if (value == null || Number.isNaN(value)) return "–";
    const s = Math.round(value), h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60;
    const two = (n) => String(n).padStart(2, "0");
    return h ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`;
  }
  const atX = { step: (v) => digits(v, 0), tokens: short, seconds: clock };
  const kinds = { number: short, bytes };

  // ---- columns to draw

  // An exponential average that leaves gaps out and is not pulled towards zero at its begin.
  function smoothed(values, share) {
    const out = new Array(values.length);
    let average = 0, weight = 0;
    for (let i = 0; i < values.length; i++) {
      const value = values[i];
      if (Number.isNaN(value)) { out[i] = null; continue; }
      average = share * average + (1 - share) * value;
      weight = share * weight + (1 - share);
      out[i] = average / weight;
    }
    return out;
  }
  const plain = (values, log) => Array.from(values, (v) => (Number.isNaN(v) || (log && v <= 0) ? null : v));
  const count = (values) => values ? values.reduce((n, v) => n + !Number.isNaN(v), 0) : 0;
  const palette = () => (shownTheme() === "dark" ? DARK : LIGHT);
  const faint = (color) => color + "40";
  const solid = (color) => color.slice(0, 7);

  function tablesOf(chart, log) {
    const tables = [], series = [], colors = palette();
    let points = 0;
    runs.forEach((run, index) => {
      if (state.hidden.has(run.name)) return;
      const color = colors[index % colors.length], named = runs.length > 1 ? run.name + " " : "";
      chart.lines.forEach((line, which) => {
        const values = run.columns[line.column];
        if (!values || !count(values)) return;
        const ink = chart.lines.length > 2 ? colors[which % colors.length] : color;
        const name = (named + line.label).trim();
        if (line.column === chart.counts || chart.lines.length > 2) points += count(values);
        const x = run.columns[state.axis];
        if (line.dots) {
          const keep = [...values.keys()].filter((i) => !Number.isNaN(values[i]));
          tables.push([keep.map((i) => x[i]), keep.map((i) => values[i])]);
          series.push({ label: name, stroke: ink, width: 1.6, dash: [5, 4], points: { show: keep.length < 400, size: 7, fill: ink } });
          return;
        }
        const smooth = state.smoothing > 0 && line.smooth;
        tables.push(smooth ? [Array.from(x), plain(values, log), smoothed(values, state.smoothing)] : [Array.from(x), plain(values, log)]);
        const few = count(values) < 60;
        const dash = chart.lines.length > 2 && index ? [6, 3] : undefined;
        series.push({ label: name, stroke: smooth ? faint(ink) : ink, width: smooth ? 1 : 1.6, dash, points: { show: few && !smooth, size: 5 } });
        if (smooth) series.push({ label: name + " smoothed", stroke: ink, width: 2, points: { show: false } });
      });
    });
    return { tables, series, points };
  }

  // ---- marks: anomalies from above, checkpoints on the axis

  function marks(chart) {
    const found = [];
    const position = (run, step) => {
      const steps = run.columns.step;
      let low = 0, high = steps.length - 1;
      while (low < high) { const m = (low + high) >> 1; if (steps[m] < step) low = m + 1; else high = m; }
      return steps.length ? run.columns[state.axis][low] : null;
    };
    runs.forEach((run, index) => {
      if (state.hidden.has(run.name)) return;
      for (const anomaly of run.anomalies)
        if (chart.marks.includes(anomaly.series)) found.push({ x: position(run, anomaly.step), kind: "anomaly" });
      if (chart.name === "loss")
        for (const saved of run.checkpoints) found.push({ x: position(run, saved.step), kind: "checkpoint", index });
    });
    return found;
  }

  function drawMarks(chart) {
    return (u) => {
      const { ctx } = u, { left, top, width, height } = u.bbox, ratio = devicePixelRatio || 1;
      const css = getComputedStyle(document.documentElement), colors = palette();
      ctx.save();
      ctx.beginPath(); ctx.rect(left - 6 * ratio, top - 10 * ratio, width + 12 * ratio, height + 20 * ratio); ctx.clip();
      for (const mark of chart.found) {
        const x = u.valToPos(mark.x, "x", true), s = 5 * ratio;
        if (x < left - 1 || x > left + width + 1) continue;
        ctx.beginPath();
        if (mark.kind === "anomaly") {
          ctx.fillStyle = ctx.strokeStyle = css.getPropertyValue("--bad");
          ctx.globalAlpha = 0.28; ctx.lineWidth = ratio;
          ctx.moveTo(x, top + s); ctx.lineTo(x, top + height); ctx.stroke();
          ctx.globalAlpha = 1; ctx.beginPath();
          ctx.moveTo(x - s, top - s * 0.6); ctx.lineTo(x + s, top - s * 0.6); ctx.lineTo(x, top + s);
        } else {
          ctx.fillStyle = colors[mark.index % colors.length]; ctx.globalAlpha = 0.9;
          const y = top + height;
          ctx.moveTo(x, y - s); ctx.lineTo(x + s, y); ctx.lineTo(x, y + s); ctx.lineTo(x - s, y);
        }
        ctx.fill();
      }
      ctx.restore();
    };
  }

  // ---- charts

  const sync = uPlot.sync("report");
  function build(chart) {
    const log = !!state.log[chart.name], element = chart.element;
    const { tables, series, points } = tablesOf(chart, log);
    element.dataset.points = points;
    if (chart.plot) { sync.unsub(chart.plot); chart.plot.destroy(); chart.plot = null; }
    const place = element.querySelector(".plot");
    if (!tables.length) { place.innerHTML = '<p class="empty">no values</p>'; return; }
    place.textContent = "";
    chart.found = marks(chart);
    const css = getComputedStyle(document.documentElement), show = kinds[chart.kind];
    const ink = css.getPropertyValue("--quiet"), grid = css.getPropertyValue("--line");
    const axis = { stroke: ink, grid: { stroke: grid, width: 1 }, ticks: { stroke: grid, width: 1 }, labelFont: "12px sans-serif", font: "11px sans-serif", labelSize: 20 };
    const joined = tables.length > 1 ? uPlot.join(tables) : tables[0];
    const options = {
      ...size(chart),
      series: [{ label: AXES[state.axis], value: (u, v) => (v == null ? "–" : atX[state.axis](v)) },
        ...series.map((one) => ({ spanGaps: true, value: (u, v) => show(v), ...one }))],
      scales: { x: { time: false }, y: { distr: log ? 3 : 1, range: log ? undefined : padded(chart.zero) } },
      axes: [
        { ...axis, label: AXES[state.axis], size: 34, values: (u, all) => all.map(atX[state.axis]), space: 70 },
        { ...axis, label: chart.unit, size: chart.kind === "bytes" ? 74 : 58, incrs: chart.kind === "bytes" ? POWERS : undefined, values: (u, all) => all.map((v) => (v == null ? "" : show(v))) },
      ],
      cursor: { sync: { key: "report", setSeries: false }, drag: { x: true, y: false }, focus: { prox: 24 }, points: { size: 6 } },
      legend: { markers: { width: 0, fill: (u, i) => (i ? solid(series[i - 1].stroke) : null) } },
      hooks: { draw: [drawMarks(chart)], setScale: [(u, key) => { if (key === "x" && !chart.quiet) follow(chart, u); }] },
      padding: [14, 12, 0, 0],
    };
    chart.quiet = true;
    chart.plot = new uPlot(options, joined, place);
    if (state.range) chart.plot.setScale("x", state.range);
    requestAnimationFrame(() => { chart.quiet = false; });
    sync.sub(chart.plot);
  }
  const padded = (zero) => (u, low, high) => {
    if (low == null) return [0, 1];
    const room = (high - low || Math.abs(high) || 1) * 0.06;
    return [zero ? 0 : low >= 0 && low - room < 0 ? 0 : low - room, high + room];
  };
  function follow(chart, u) {
    const { min, max } = u.scales.x;
    if (min == null) return;
    const all = u.data[0];
    state.range = min <= all[0] && max >= all[all.length - 1] ? null : { min, max };
  }
  function size(chart) {
    const width = Math.max(240, Math.floor(chart.element.querySelector(".plot").clientWidth));
    return { width, height: chart.name === "loss" ? (width < 600 ? 260 : 340) : 220 };
  }
  function draw() { for (const chart of charts.values()) build(chart); }

  // ---- the runs and their figures

  function tiles() {
    const place = byId("runs"), colors = palette();
    place.textContent = "";
    runs.forEach((run, index) => {
      const card = document.createElement("div");
      card.className = "run";
      const label = document.createElement("label"), box = document.createElement("input"), line = document.createElement("i");
      box.type = "checkbox"; box.checked = !state.hidden.has(run.name); box.hidden = runs.length < 2;
      box.addEventListener("change", () => { box.checked ? state.hidden.delete(run.name) : state.hidden.add(run.name); draw(); });
      line.style.background = colors[index % colors.length];
      label.append(box, line, run.name);
      const list = document.createElement("div");
      list.className = "tiles";
      for (const [name, value, kind] of run.summary) {
        const tile = document.createElement("div"), b = document.createElement("b"), span = document.createElement("span");
        tile.className = "tile";
        b.textContent = kind === "bytes" ? bytes(value) : kind === "clock" ? clock(value) : kind === "text" ? value : short(value);
        span.textContent = name;
        tile.append(b, span); list.append(tile);
      }
      card.append(label, list); place.append(card);
    });
  }

  // ---- theme, controls, a run that goes on

  const dark = matchMedia("(prefers-color-scheme: dark)");
  function shownTheme() { return state.printing ? "light" : state.theme === "auto" ? (dark.matches ? "dark" : "light") : state.theme; }
  function applyTheme() {
    document.documentElement.dataset.shown = shownTheme();
    byId("theme").textContent = state.theme === "auto" ? "theme: system" : `theme: ${state.theme}`;
    tiles(); draw();
  }
  function later(run) { let timer; return () => { clearTimeout(timer); timer = setTimeout(run, 60); }; }

  function refresh() {
    fetch("data.json").then((answer) => (answer.ok ? answer.json() : null)).then((fresh) => {
      if (!fresh || fresh.revision === data.revision) return;
      data = fresh; load(); tiles(); draw();
      byId("details").innerHTML = fresh.sections;
    }).catch(() => { byId("live").textContent = "ended"; clearInterval(refresh.timer); });
  }

  function start() {
    load();
    for (const chart of data.charts) {
      const element = document.querySelector(`[data-chart="${chart.name}"]`);
      if (!element) continue;
      charts.set(chart.name, { ...chart, element, plot: null, found: [] });
      element.querySelector(".log").addEventListener("click", (event) => {
        state.log[chart.name] = !state.log[chart.name];
        event.currentTarget.setAttribute("aria-pressed", state.log[chart.name]);
        build(charts.get(chart.name));
      });
    }
    byId("axis").addEventListener("click", (event) => {
      const wanted = event.target.dataset.axis;
      if (!wanted) return;
      for (const one of byId("axis").children) one.setAttribute("aria-pressed", one === event.target);
      state.axis = wanted; state.range = null; draw();
    });
    byId("smoothing").addEventListener("input", later(() => { state.smoothing = Number(byId("smoothing").value); draw(); }));
    byId("reset").addEventListener("click", () => { state.range = null; draw(); });
    byId("theme").addEventListener("click", () => {
      state.theme = { auto: "light", light: "dark", dark: "auto" }[state.theme];
      applyTheme();
    });
    dark.addEventListener("change", () => applyTheme());
    const print = (on) => () => { state.printing = on; applyTheme(); };
    addEventListener("beforeprint", print(true));
    addEventListener("afterprint", print(false));
    addEventListener("resize", later(() => { for (const c of charts.values()) if (c.plot) c.plot.setSize(size(c)); }));
    applyTheme();
    if (data.live) { byId("live").hidden = false; refresh.timer = setInterval(refresh, 2000); }
    document.documentElement.dataset.ready = "yes";
  }
  start();
})();
