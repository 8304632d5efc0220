"use strict";
// The charts of a report. The numbers are in #data: per run, columns of base64 float32, one value
// per step, NaN where nothing was measured.
(() => {
  const LIGHT = ["#2457d6", "#d9480f", "#2b8a3e", "#9c36b5", "#0c8599", "#c2255c", "#e67700", "#5f3dc4"];
  const DARK = ["#7aa2ff", "#ff9d66", "#69db7c", "#da9bf0", "#3bc9db", "#faa2c1", "#ffd43b", "#b197fc"];
  const AXES = { step: "optimizer step", tokens: "tokens", seconds: "training time" };
  const POWERS = Array.from({ length: 50 }, (_, i) => 2 ** i);
  const TIMES = [0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200, 86400,
    172800, 432000, 864000, 1728000, 4320000, 8640000];
  const ROOFLINE = "roofline", LIVE_SECONDS = 2, PRINTED = { wide: 660, narrow: 308 };
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

  const isNumber = (value) => value != null && !Number.isNaN(value);
  const digits = (value, places) => value.toLocaleString("en", { maximumFractionDigits: places });
  const power = (value) => Number(value.toPrecision(3)).toExponential(); // 5e-4, 1.25e-3
  // What a number of this size is divided by, and the letter that stands for it.
  const unitOf = (size) => (size >= 1e9 ? [1e9, " G"] : size >= 1e6 ? [1e6, " M"] : size >= 1e4 ? [1e3, " k"] : [1, ""]);
  function short(value) {
    if (!isNumber(value)) return "–";
    const size = Math.abs(value), [scale, letter] = unitOf(size);
    if (letter) return digits(value / scale, letter === " k" ? 1 : 2) + letter;
    if (size >= 100) return digits(value, 1);
    return size >= 0.01 || size === 0 ? digits(value, 4) : power(value);
  }
  function bytes(value) {
    if (!isNumber(value)) return "–";
    for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 1024]])
      if (Math.abs(value) >= size) return digits(value / size, Math.abs(value) >= 100 * size ? 0 : 2) + " " + unit;
    return digits(value, 0) + " B";
  }
  function clock(value) {
    if (!isNumber(value)) return "–";
    if (value < 10) return digits(value, 2) + " s";
    const s = Math.round(value), h = Math.floor(s / 3600), m = Math.floor(s / 60) % 60;
    const two = (n) => String(n).padStart(2, "0");
    return h ? `${h}:${two(m)}:${two(s % 60)}` : `${m}:${two(s % 60)}`;
  }
  const atX = { step: (v) => digits(v, 0), tokens: short, seconds: clock };
  const kinds = { number: short, bytes };

  // The labels of an axis have one unit: 5 k and 10 k, not 5,000 and 10 k.
  function ticks(all) {
    const most = Math.max(0, ...all.filter(isNumber).map(Math.abs)), [scale, letter] = unitOf(most);
    return all.map((v) => (!isNumber(v) ? "" : v === 0 ? "0" : most < 0.01 ? power(v) : digits(v / scale, 6) + letter));
  }
  function times(all) {
    const known = all.filter(isNumber), whole = (size) => known.every((v) => v % size === 0);
    const most = Math.max(0, ...known);
    const one = most < 120 ? (v) => `${digits(v, 1)} s`
      : whole(3600) ? (v) => `${digits(v / 3600, 0)} h` : most < 3600 && whole(60) ? (v) => `${v / 60} min` : clock;
    return all.map((v) => (!isNumber(v) ? "" : v === 0 ? "0" : one(v)));
  }
  const alongX = { step: (all) => all.map(atX.step), tokens: ticks, seconds: times };

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
  const count = (values) => (values ? values.reduce((n, v) => n + !Number.isNaN(v), 0) : 0);
  const palette = () => (shownTheme() === "dark" ? DARK : LIGHT);
  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
  const faint = (color) => color + "40";
  // More lines than colours are layers: from blue, the first, to red.
  function inkOf(which, among) {
    const colors = palette();
    if (among <= colors.length) return colors[which];
    return `hsl(${Math.round(225 * (1 - which / (among - 1)))} 70% ${shownTheme() === "dark" ? 65 : 45}%)`;
  }

  // One table (x, values, ...) per line of the chart, and how each is drawn. `raw` is the series whose
  // values a smoothed one stands for.
  function tablesOf(chart, log) {
    const tables = [], series = [], colors = palette();
    let points = 0;
    runs.forEach((run, index) => {
      if (state.hidden.has(run.name)) return;
      const color = colors[index % colors.length], named = runs.length > 1 ? run.name + " " : "";
      chart.lines.forEach((line, which) => {
        const values = run.columns[line.column], n = count(values);
        if (!n) return;
        const many = chart.lines.length > 2, ink = many ? inkOf(which, chart.lines.length) : color;
        const label = (named + (chart.lines.length > 1 || !named ? line.label : "")).trim();
        if (line.column === chart.counts || many) points += n;
        const x = run.columns[state.axis];
        if (line.dots) {
          const keep = [...values.keys()].filter((i) => !Number.isNaN(values[i]));
          tables.push([keep.map((i) => x[i]), keep.map((i) => values[i])]);
          series.push({ label, stroke: ink, ink, width: 1.6, dash: [5, 4], points: { show: keep.length < 400, size: 7, fill: ink } });
          return;
        }
        const smooth = state.smoothing > 0 && line.smooth && n > 1, place = series.length + 1;
        tables.push(smooth ? [Array.from(x), plain(values, log), smoothed(values, state.smoothing)] : [Array.from(x), plain(values, log)]);
        const dash = many && index ? [6, 3] : undefined;
        series.push({ label, stroke: smooth ? faint(ink) : ink, ink, width: smooth ? 1 : 1.6, dash, points: { show: n < 60 && !smooth, size: 5 } });
        if (smooth) series.push({ label, stroke: ink, ink, width: 2, points: { show: false }, raw: place });
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
      const named = runs.length > 1 ? `${run.name}, ` : "";
      for (const { step, series, what } of run.anomalies)
        if (chart.marks.includes(series)) found.push({ x: position(run, step), kind: "anomaly", text: `${named}step ${atX.step(step)}: ${what}` });
      if (chart.name === "loss")
        for (const { step, name } of run.checkpoints)
          found.push({ x: position(run, step), kind: "checkpoint", index, text: `${named}step ${atX.step(step)}: saved as ${name}` });
    });
    return found;
  }

  function drawMarks(chart) {
    return (u) => {
      const { ctx } = u, { left, top, width, height } = u.bbox, ratio = devicePixelRatio || 1, colors = palette();
      ctx.save();
      ctx.setLineDash([]);
      ctx.beginPath(); ctx.rect(left - 6 * ratio, top - 10 * ratio, width + 12 * ratio, height + 20 * ratio); ctx.clip();
      for (const mark of chart.found) {
        const x = u.valToPos(mark.x, "x", true), s = 5 * ratio;
        if (x < left - 1 || x > left + width + 1) continue;
        ctx.beginPath();
        if (mark.kind === "anomaly") {
          ctx.fillStyle = ctx.strokeStyle = style("--bad");
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

  // A box beside the pointer with what `found(u)` says is there: { x, y, lines }, or null.
  function tip(found) {
    let box = null;
    return {
      init: (u) => { box = document.createElement("div"); box.className = "tip"; box.hidden = true; u.over.append(box); },
      setCursor: (u) => {
        const here = u.over.matches(":hover") && u.cursor.left >= 0 ? found(u) : null;
        box.hidden = !here;
        if (!here) return;
        box.textContent = here.lines.join("\n");
        const right = here.x > u.over.clientWidth / 2;
        box.style.left = right ? "auto" : `${here.x + 10}px`;
        box.style.right = right ? `${u.over.clientWidth - here.x + 10}px` : "auto";
        box.style.top = `${Math.max(0, here.y)}px`;
      },
    };
  }
  function marksNear(chart) {
    return (u) => {
      const near = chart.found.filter((mark) => Math.abs(u.valToPos(mark.x, "x") - u.cursor.left) < 6);
      return near.length ? { x: u.cursor.left, y: u.cursor.top - 8, lines: near.slice(0, 4).map((mark) => mark.text) } : null;
    };
  }

  // ---- charts

  const sync = uPlot.sync("report");
  // The lines of a logarithmic axis stand at powers of ten, where it spans more than one.
  const decades = (u, splits) => {
    const whole = splits.filter((v) => Number.isInteger(Math.round(1e9 * Math.log10(v)) / 1e9));
    return whole.length < 2 ? splits : splits.map((v) => (whole.includes(v) ? v : null));
  };
  function axes(x, y) {
    const ink = style("--quiet"), stroke = style("--line");
    const filter = (u, splits, axis) => (u.scales[axis === 0 ? "x" : "y"].distr === 3 ? decades(u, splits) : splits);
    const both = { stroke: ink, grid: { stroke, width: 1, filter }, ticks: { stroke, width: 1, filter }, labelFont: "12px sans-serif", font: "11px sans-serif", labelSize: 20 };
    return [{ ...both, size: 34, space: 70, ...x }, { ...both, size: 58, ...y }];
  }
  function remove(chart) {
    if (chart.plot) { sync.unsub(chart.plot); chart.plot.destroy(); chart.plot = null; }
  }
  // What the legend says of a series: its value under the pointer, or else its last one.
  function valueOf(one, show) {
    const at = (u, i, index) => {
      const values = u.data[i];
      if (index != null && values[index] != null) return values[index];
      let last = (index ?? values.length) - 1;
      while (last >= 0 && values[last] == null) last--;
      return last < 0 ? null : values[last];
    };
    return (u, _, i, index) => {
      const value = show(at(u, i, index));
      return one.raw == null ? value : `${show(at(u, one.raw, index))}, smoothed ${value}`;
    };
  }
  function optionsOf(chart, series, log) {
    const show = kinds[chart.kind], isBytes = chart.kind === "bytes";
    const along = state.axis === "seconds" ? { incrs: TIMES } : {};
    return {
      ...size(chart),
      series: [{ label: AXES[state.axis], value: (u, v) => atX[state.axis](v ?? u.data[0][u.data[0].length - 1]) },
        ...series.map((one) => ({ spanGaps: true, value: valueOf(one, show), ...one }))],
      scales: { x: { time: false }, y: { distr: log ? 3 : 1, log: isBytes ? 2 : 10, range: log ? undefined : padded(chart.zero) } },
      axes: axes(
        { ...along, label: AXES[state.axis], values: (u, all) => alongX[state.axis](all) },
        { label: chart.unit, size: isBytes ? 74 : 58, incrs: isBytes ? POWERS : undefined,
          values: (u, all) => (isBytes ? all.map((v) => (v == null ? "" : bytes(v))) : ticks(all)) }),
      cursor: { sync: { key: "report", setSeries: false }, drag: { x: true, y: false }, focus: { prox: 24 }, points: { size: 6 } },
      legend: { markers: { width: 0, fill: (u, i) => (i ? series[i - 1].ink : null) } },
      hooks: { draw: [drawMarks(chart)], setScale: [(u, key) => { if (key === "x" && !chart.quiet) follow(chart, u); }],
        // A click on the legend hides a line, and with it the values that it was smoothed from.
        setSeries: [(u, i, { show: shown }) => { if (i && shown != null && series[i - 1].raw) u.setSeries(series[i - 1].raw, { show: shown }, false); }] },
      plugins: [{ hooks: tip(marksNear(chart)) }],
      padding: [14, 12, 0, 0],
    };
  }
  function build(chart) {
    if (chart.name === ROOFLINE) { buildRoofline(chart); return; }
    const log = !!state.log[chart.name], element = chart.element, place = element.querySelector(".plot");
    const { tables, series, points } = tablesOf(chart, log);
    element.dataset.points = points;
    if (!tables.length) { remove(chart); place.innerHTML = '<p class="empty">no values</p>'; return; }
    chart.found = marks(chart);
    legendOfMarks(chart);
    const joined = tables.length > 1 ? uPlot.join(tables) : tables[0];
    const looks = JSON.stringify([series, log, state.axis, shownTheme(), size(chart)]);
    const within = state.range;
    chart.quiet = true;
    if (chart.plot && chart.looks === looks) chart.plot.setData(joined); // a run that goes on: the pointer stays
    else {
      remove(chart);
      place.textContent = "";
      chart.plot = new uPlot(optionsOf(chart, series, log), joined, place);
      const rows = place.querySelectorAll(".u-series");
      for (const { raw } of series) if (raw) rows[raw].hidden = true;
      sync.sub(chart.plot);
    }
    chart.looks = looks;
    if (within) chart.plot.setScale("x", within);
    requestAnimationFrame(() => { chart.quiet = false; });
  }
  function legendOfMarks(chart) {
    const has = (kind) => chart.found.some((mark) => mark.kind === kind);
    chart.element.querySelector(".marks").innerHTML =
      (has("anomaly") ? '<span class="bad">▼</span> anomaly ' : "") + (has("checkpoint") ? "<span>◆</span> checkpoint" : "");
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
    const width = state.printing ? PRINTED[chart.wide ? "wide" : "narrow"] : Math.max(240, Math.floor(chart.element.querySelector(".plot").clientWidth));
    return { width, height: chart.wide ? (width < 600 ? 260 : 340) : 220 };
  }
  function draw() { for (const chart of charts.values()) build(chart); }

  // ---- the roofline: operations under what the machine can do

  function buildRoofline(chart) {
    remove(chart);
    const place = chart.element.querySelector(".plot"), colors = palette(), several = runs.filter((run) => run.roofline).length > 1;
    const shown = runs.flatMap((run, index) => (run.roofline && !state.hidden.has(run.name) ? run.roofline.points.map((point) => ({
      ...point, ink: several ? colors[index % colors.length] : colors[point.backward ? 1 : 0], run: several ? `${run.name}: ` : "" })) : []));
    chart.element.dataset.points = shown.length;
    if (!shown.length) { place.innerHTML = '<p class="empty">no operations</p>'; return; }
    place.textContent = "";
    const ceilings = runs.map((run) => run.roofline && run.roofline.ceilings).find(Boolean);
    const peaks = ceilings ? [["float32", ceilings.float32_gflops, undefined], ["bfloat16", ceilings.bfloat16_gflops, [6, 4]]] : [];
    const bandwidth = ceilings && ceilings.gb_per_second;
    const xs = shown.map((p) => p.x).concat(peaks.map(([, peak]) => peak / bandwidth));
    const ys = shown.map((p) => p.y).concat(peaks.map(([, peak]) => peak));
    const around = (values) => [10 ** Math.floor(Math.log10(Math.min(...values)) - 0.2), 10 ** Math.ceil(Math.log10(Math.max(...values)) + 0.2)];
    const [low, high] = around(xs), tables = peaks.map(([, peak]) => [[low, peak / bandwidth, high], [low * bandwidth, peak, peak]]);
    const radius = (p) => 3 + 22 * Math.sqrt(p.share);
    const circles = (u) => {
      const { ctx, bbox } = u, ratio = devicePixelRatio || 1;
      ctx.save();
      ctx.setLineDash([]);
      ctx.beginPath(); ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height); ctx.clip();
      for (const p of shown) {
        ctx.beginPath();
        ctx.arc(u.valToPos(p.x, "x", true), u.valToPos(p.y, "y", true), radius(p) * ratio, 0, 2 * Math.PI);
        ctx.fillStyle = ctx.strokeStyle = p.ink;
        ctx.globalAlpha = 0.35; ctx.fill(); ctx.globalAlpha = 1; ctx.lineWidth = ratio; ctx.stroke();
      }
      ctx.restore();
    };
    const nearest = (u) => {
      let best = null, least = Infinity;
      for (const p of shown) {
        const x = u.valToPos(p.x, "x"), y = u.valToPos(p.y, "y");
        const away = Math.hypot(x - u.cursor.left, y - u.cursor.top) - radius(p);
        if (away < least) { least = away; best = { x, y, p }; }
      }
      if (least > 6) return null;
      const { p } = best;
      return { ...best, lines: [`${p.run}${p.name}`, `${digits(100 * p.share, 1)} % of the step`,
        `${three(p.y)} GFLOPS at ${three(p.x)} operations per byte`, ...p.source] };
    };
    const three = (v) => digits(Number(v.toPrecision(3)), 3);
    const name = ([label, peak]) => `${label}: ${three(peak)} GFLOPS, ${three(bandwidth)} GB/s`;
    const grey = style("--quiet");
    chart.plot = new uPlot({
      ...size(chart),
      series: [{}, ...(peaks.length ? peaks.map((peak) => ({ label: name(peak), stroke: grey, width: 1.4, dash: peak[2], points: { show: false }, value: () => "", spanGaps: true })) : [{ label: "", show: false }])],
      scales: { x: { time: false, distr: 3, range: () => [low, high] }, y: { distr: 3, range: () => around(ys) } },
      axes: axes({ label: "operations per byte", values: (u, all) => all.map((v) => (v == null ? "" : short(v))) },
        { label: "GFLOPS", values: (u, all) => all.map((v) => (v == null ? "" : short(v))) }),
      cursor: { drag: { x: false, y: false }, points: { show: false } },
      legend: { show: false },
      hooks: { draw: [circles] },
      plugins: [{ hooks: tip(nearest) }],
      padding: [14, 24, 0, 0],
    }, tables.length ? uPlot.join(tables) : [[low, high], [null, null]], place);
    const key = (ink, label, kind) => `<span class="key"><i class="${kind}" style="--ink:${ink}"></i>${label}</span>`;
    const dots = several ? [] : [key(colors[0], "forward", "dot"), key(colors[1], "backward", "dot")];
    const lines = peaks.map((peak) => key(grey, name(peak), peak[2] ? "dashed" : "line"));
    const legend = document.createElement("p");
    legend.className = "keys";
    legend.innerHTML = [...dots, ...lines].join("") + '<span class="key">larger: more of the step</span>';
    place.append(legend);
  }

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
        b.textContent = { bytes, clock, number: short }[kind](value);
        span.textContent = name;
        tile.append(b, span); list.append(tile);
      }
      card.append(label, list); place.append(card);
    });
  }

  // ---- theme, controls

  const dark = matchMedia("(prefers-color-scheme: dark)");
  function shownTheme() { return state.printing ? "light" : state.theme === "auto" ? (dark.matches ? "dark" : "light") : state.theme; }
  function applyTheme() {
    document.documentElement.dataset.shown = shownTheme();
    byId("theme").textContent = state.theme === "auto" ? "theme: system" : `theme: ${state.theme}`;
    tiles(); draw();
  }
  function later(run) { let timer; return () => { clearTimeout(timer); timer = setTimeout(run, 60); }; }

  // Take the charts of the data that are not there yet, behind the one before them.
  function takeCharts() {
    let before = null;
    for (const chart of data.charts) {
      if (!charts.has(chart.name)) {
        let element = document.querySelector(`[data-chart="${chart.name}"]`);
        if (!element && data.elements) {
          if (before) before.insertAdjacentHTML("afterend", data.elements[chart.name]);
          else byId("charts").insertAdjacentHTML("afterbegin", data.elements[chart.name]);
          element = document.querySelector(`[data-chart="${chart.name}"]`);
        }
        if (!element) continue;
        charts.set(chart.name, { element, plot: null, found: [] });
        element.querySelector(".log")?.addEventListener("click", (event) => {
          state.log[chart.name] = !state.log[chart.name];
          event.currentTarget.setAttribute("aria-pressed", state.log[chart.name]);
          build(charts.get(chart.name));
        });
      }
      before = Object.assign(charts.get(chart.name), chart).element;
    }
  }

  // ---- a run that goes on

  let changed = Date.now();
  function say(text, isBad = false) {
    const badge = byId("live");
    badge.hidden = false; badge.textContent = text; badge.classList.toggle("bad", isBad);
  }
  function quietFor() {
    const seconds = (Date.now() - changed) / 1000;
    say(seconds < 30 ? "live" : `no new step for ${clock(seconds)}`);
  }
  async function refresh() {
    const begun = performance.now();
    let fresh;
    try {
      const answer = await fetch(`data.json?${data.revision}`);
      fresh = answer.ok ? await answer.json() : { problem: (await answer.text()).trim() };
    } catch {
      say("the command that served this page has ended", true);
      return;
    }
    if (fresh.problem) say(fresh.problem, true);
    else if (fresh.revision === data.revision) quietFor();
    else {
      if (fresh.details !== data.details) byId("details").innerHTML = fresh.sections;
      data = fresh; changed = Date.now();
      load(); takeCharts(); tiles(); draw(); quietFor();
    }
    // A long run takes a while to read: the machine has something better to do than that.
    setTimeout(refresh, Math.max(1000 * LIVE_SECONDS, 4 * (performance.now() - begun)));
  }

  function start() {
    load();
    takeCharts();
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
    addEventListener("resize", later(() => { if (!state.printing) for (const c of charts.values()) if (c.plot) c.plot.setSize(size(c)); }));
    applyTheme();
    if (data.live) { quietFor(); setTimeout(refresh, 1000 * LIVE_SECONDS); }
    document.documentElement.dataset.ready = "yes";
  }
  start();
})();
