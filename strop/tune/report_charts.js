// Draws the charts, in the colours of the page, again whenever its width or its colours change.
// Axes are linear for plotly: a logarithmic scale maps its values itself, so that zero has a place.
"use strict";
(() => {
  const { points, max_drop: maxDrop } = JSON.parse(document.getElementById("charts").textContent);
  const SYMBOLS = [
    "circle", "square", "triangle-up", "diamond", "cross", "x", "star", "triangle-down",
  ];
  const LETTER = { width: 6.4, height: 15 };
  const SIDES = [[1, -1], [-1, 0], [-1, 1], [1, 0], [0, -1], [0, 1], [-1, -1], [1, 1]];
  let printing = false;

  const known = (value) => value !== null && value !== undefined;
  // Plotly reads tags and entities in its texts: a label must show as it is written.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const clip = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);
  function fold(text, length) {
    const parts = new RegExp(`\\S{${length}}|.{1,${length}}(?=\\s|$)`, "gs");
    return Array.from(text.matchAll(parts), ([part]) => part.trim());
  }

  // ---- scales: `to` maps a value to axis units, `range` is in those units ----

  const percent = (value) => `${+(100 * value).toPrecision(2)} %`;
  const plainNumber = (value) => `${+value.toPrecision(2)}`;
  const bytes = (value) => {
    const power = Math.max(0, Math.min(4, Math.floor(Math.log2(value) / 10)));
    return `${+(value / 1024 ** power).toPrecision(3)} ${["B", "KiB", "MiB", "GiB", "TiB"][power]}`;
  };

  function linearScale(values, title, fromZero = false) {
    const low = fromZero ? 0 : Math.min(...values), high = Math.max(...values);
    const pad = 0.08 * (high - low || 1);
    const range = [fromZero ? 0 : low - pad, high + pad];
    return { to: (value) => value, range, axis: { title, nticks: 8 } };
  }

  /** At most five decades; what lies under them, zero included, shares one line at the bottom. */
  function logScale(values, title, format, base = 10) {
    const positive = values.filter((value) => value > 0);
    const top = positive.length ? Math.log10(Math.max(...positive)) : 0;
    const bottom = positive.length ? Math.log10(Math.min(...positive)) : -1;
    const least = Math.max(Math.floor(bottom), Math.ceil(top) - 5);
    const under = values.some((value) => value < 10 ** least);
    const low = under ? least - 0.5 : bottom;
    const pad = 0.08 * (top - low || 1);
    const ticks = steps([under ? least : low - pad, top + pad], base);
    return {
      to: (value) => (value < 10 ** least ? least - 0.5 : Math.log10(value)),
      range: [low - pad, top + pad],
      axis: {
        title,
        tickvals: [...(under ? [low] : []), ...ticks.map(Math.log10)],
        ticktext: [...(under ? [`< ${format(10 ** least)}`] : []), ...ticks.map(format)],
      },
    };
  }

  function steps([low, high], base) {
    const span = (high - low) / Math.log10(base);
    const parts = base !== 10 || span > 2.5 ? [1] : span > 1.2 ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7];
    const stride = Math.max(1, Math.round(span / 8));
    const ticks = [];
    for (let k = Math.floor(low / Math.log10(base)); k <= Math.ceil(high / Math.log10(base)); k++)
      for (const part of parts)
        if (k % stride === 0) ticks.push(part * base ** k);
    return ticks.filter((tick) => Math.log10(tick) >= low && Math.log10(tick) <= high);
  }

  // ---- a chart: marks {point, x, y, low, high} on two scales ----

  function series(marks, x, y, marker, look) {
    const gap = (end) => marks.map((m) => (known(m[end]) ? Math.abs(y.to(m[end]) - y.to(m.y)) : 0));
    return {
      type: "scatter", mode: "markers", marker, hoverinfo: "text",
      x: marks.map((m) => x.to(m.x)),
      y: marks.map((m) => y.to(m.y)),
      hovertext: marks.map((m) => words(m.point, look)),
      error_y: {
        type: "data", symmetric: false, array: gap("high"), arrayminus: gap("low"),
        thickness: 1, width: 0, color: look.quiet,
      },
    };
  }

  function words(point, look) {
    const length = look.narrow ? 34 : 56;
    const lines = point.hover.flatMap((line) => fold(line, length));
    const name = fold(point.label, length).map(plain).join("<br>");
    return [`<b>${name}</b>`, ...lines.map(plain)].join("<br>");
  }

  /** Marks that no other mark beats in both directions of this chart, from left to right. */
  function lowerLeft(marks) {
    let best = Infinity;
    const ordered = [...marks].sort((a, b) => a.x - b.x || a.y - b.y);
    return ordered.filter((m) => m.y < best && ((best = m.y), true));
  }

  /** Names beside their marks where they cover neither a mark nor a name; bold ones in any case. */
  function labels(named, marks, x, y, look) {
    const px = (v) => ((v - x.range[0]) / (x.range[1] - x.range[0])) * look.width;
    const py = (v) => ((y.range[1] - v) / (y.range[1] - y.range[0])) * look.height;
    const box = (left, top, w, h) => ({ left, top, right: left + w, bottom: top + h });
    const taken = marks.map((m) => box(px(x.to(m.x)) - 6, py(y.to(m.y)) - 6, 12, 12));
    const apart = (a, b) =>
      a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
    const inside = (a) =>
      a.left >= 0 && a.top >= 0 && a.right <= look.width && a.bottom <= look.height;
    const covered = (a) => taken.filter((b) => !apart(a, b)).length;
    return named.flatMap(({ mark, name, bold }) => {
      const text = clip(name, look.narrow ? 22 : 40);
      const width = text.length * LETTER.width * (bold ? 1.08 : 1), height = LETTER.height;
      const u = x.to(mark.x), v = y.to(mark.y), gap = bold ? 13 : 9;
      const places = SIDES.map(([dx, dy]) => {
        const away = dx && dy ? 0.75 * gap : gap;
        const cx = px(u) + dx * (away + width / 2), cy = py(v) + dy * (away + height / 2);
        return { cx, cy, ...box(cx - width / 2, cy - height / 2, width, height) };
      });
      const [place] = places.filter(inside).sort((a, b) => covered(a) - covered(b));
      if (!place || (covered(place) && !bold)) return [];
      taken.push(place);
      return [{
        x: u, y: v, xshift: place.cx - px(u), yshift: py(v) - place.cy, showarrow: false,
        text: bold ? `<b>${plain(text)}</b>` : plain(text), font: { size: 11.5, color: look.ink },
      }];
    });
  }

  function rule(axis, value, look, dash) {
    const other = axis === "x" ? "y" : "x";
    return {
      type: "line", layer: "below", line: { color: look.quiet, width: 1, dash },
      [`${axis}0`]: value, [`${axis}1`]: value, [`${other}0`]: 0, [`${other}1`]: 1,
      [`${other}ref`]: "paper",
    };
  }

  /** Marks by what became of their recipes, the frontier through `front`, a ring for the chosen. */
  function tradeoff(marks, front, x, y, look, shapes) {
    const within = (m) => m.point.within && !m.point.baseline;
    const baseline = marks.filter((m) => m.point.baseline), inside = marks.filter(within);
    const outside = marks.filter((m) => !m.point.baseline && !m.point.within);
    const chosen = marks.filter((m) => m.point.chosen);
    const ends = lowerLeft(front);
    const line = {
      type: "scatter", mode: "lines", hoverinfo: "skip", x: ends.map((m) => x.to(m.x)),
      y: ends.map((m) => y.to(m.y)), line: { color: look.accent, width: 1.5, shape: "hv" },
    };
    const ring = { size: 20, symbol: "circle-open", color: look.accent, line: { width: 2 } };
    const opacity = inside.map((m) => (m.point.frontier ? 1 : 0.5));
    const solid = { size: 9, color: look.accent, opacity };
    const hollow = { size: 9, symbol: "diamond-open", color: look.warn, line: { width: 1.5 } };
    const square = { size: 10, symbol: "square", color: look.ink };
    const name = (m) => ({ mark: m, name: m.point.label, bold: m.point.chosen });
    const others = [...baseline, ...ends].filter((m) => !m.point.chosen);
    return {
      x, y, shapes, named: [...chosen, ...new Set(others)].map(name), marks,
      data: [
        line,
        { ...series(chosen, x, y, ring, look), hoverinfo: "skip" },
        series(outside, x, y, hollow, look),
        series(inside, x, y, solid, look),
        series(baseline, x, y, square, look),
      ],
    };
  }

  /** A curve a KV cache method over the bytes that its settings take. */
  function byMethod(marks, y, look, shapes) {
    if (!marks.length) return null;
    const whole = points.find((p) => p.baseline && known(p.kv));
    const sizes = [...marks.map((m) => m.x), ...(whole ? [whole.kv] : [])];
    const x = logScale(sizes, "KV cache, bytes (log)", bytes, 2);
    const families = [...new Set(points.map((p) => p.family).filter(Boolean))];
    const data = families.map((family, index) => {
      const own = marks.filter((m) => m.point.family === family).sort((a, b) => a.x - b.x);
      const color = look.series[index % 8];
      const marker = { size: 9, color, symbol: SYMBOLS[(index + (index >> 3)) % 8] };
      const line = { width: 1, color };
      return { ...series(own, x, y, marker, look), mode: "lines+markers", line };
    });
    const note = whole && {
      x: x.to(whole.kv), xanchor: "right", xshift: -4, y: 0, yref: "paper", yanchor: "bottom",
      showarrow: false, text: "as it is", font: { size: 11.5, color: look.quiet },
    };
    return {
      x, y, data, marks, notes: whole ? [note] : [],
      shapes: whole ? [rule("x", x.to(whole.kv), look, "dot"), ...shapes] : shapes,
      named: marks.map((m) => ({ mark: m, name: m.point.setting || m.point.label })),
    };
  }

  const CHARTS = {
    speed(look) {
      const marks = points
        .filter((p) => known(p.memory) && p.time && known(p.time[0]))
        .map((p) => ({ point: p, x: p.memory, y: p.time[0], low: p.time[1], high: p.time[2] }));
      if (!marks.length) return null;
      const times = [1, ...marks.flatMap((m) => [m.y, m.low, m.high].filter(known))];
      const title = "time per token, baseline = 1";
      const far = Math.max(...times) / Math.min(...times) > 3;
      const y = far ? logScale(times, `${title} (log)`, plainNumber) : linearScale(times, title);
      const x = linearScale([1, ...marks.map((m) => m.x)], "memory, baseline = 1", true);
      const front = marks.filter((m) => m.point.frontier && (m.point.within || m.point.baseline));
      const shapes = [rule("x", 1, look, "dot"), rule("y", y.to(1), look, "dot")];
      return tradeoff(marks, front, x, y, look, shapes);
    },

    quality(look) {
      const marks = points
        .filter((p) => known(p.memory) && known(p.drop))
        .map((p) => ({ point: p, x: p.memory, y: p.drop }));
      if (!marks.length) return null;
      const bounds = [...marks.map((m) => m.y), ...(maxDrop > 0 ? [maxDrop] : [])];
      const y = logScale(bounds, "upper limit of the drop (log)", percent);
      const x = linearScale([1, ...marks.map((m) => m.x)], "memory, baseline = 1", true);
      const shapes = maxDrop > 0 ? [rule("y", y.to(maxDrop), look, "dash")] : [];
      const chart = tradeoff(marks, marks.filter((m) => m.point.frontier), x, y, look, shapes);
      const note = {
        x: 0, xref: "paper", xanchor: "left", y: y.to(maxDrop), yanchor: "bottom", showarrow: false,
        text: `allowed drop ${percent(maxDrop)}`, font: { size: 11.5, color: look.quiet },
      };
      return { ...chart, notes: shapes.length ? [note] : [] };
    },

    kv(look) {
      const marks = points
        .filter((p) => p.family && known(p.kv) && known(p.kl[0]))
        .map((p) => ({ point: p, x: p.kv, y: p.kl[0], low: p.kl[1], high: p.kl[2] }));
      const divergences = marks.flatMap((m) => [m.y, m.low, m.high].filter(known));
      return byMethod(marks, logScale(divergences, "KL, nats a token (log)", plainNumber), look, []);
    },

    accuracy(look) {
      const marks = points
        .filter((p) => p.family && known(p.kv) && known(p.exact))
        .map((p) => ({ point: p, x: p.kv, y: p.exact }));
      const whole = points.find((p) => p.baseline && known(p.exact));
      const shares = [0, ...marks.map((m) => m.y), ...(whole ? [whole.exact] : [])];
      const y = linearScale(shares, "exact match");
      return byMethod(marks, y, look, whole ? [rule("y", whole.exact, look, "dot")] : []);
    },
  };

  function draw(id) {
    const div = document.getElementById(id);
    if (!div) return;
    const style = getComputedStyle(document.documentElement);
    const get = (name) => style.getPropertyValue(`--${name}`).trim();
    const width = div.clientWidth, height = div.clientHeight;
    const narrow = width < 560;
    const margin = { l: narrow ? 66 : 76, r: 20, t: 14, b: 52 };
    const look = {
      narrow, width: width - margin.l - margin.r, height: height - margin.t - margin.b,
      ink: get("ink"), quiet: get("quiet"), accent: get("accent"), warn: get("warn"),
      series: SYMBOLS.map((_, index) => get(`series-${index}`)),
    };
    const chart = CHARTS[id](look);
    if (!chart) {
      div.textContent = "Nothing was measured that this chart could show.";
      div.className = "note";
      return;
    }
    const names = labels(chart.named, chart.marks, chart.x, chart.y, look);
    const axis = ({ range, axis: { title, ...rest } }) => ({
      ...rest, range, title: { text: title, standoff: 10 }, color: look.quiet, zeroline: false,
      gridcolor: get("rule"), linecolor: get("rule"), showline: true, fixedrange: look.narrow,
    });
    const layout = {
      width, height, margin, showlegend: false, hovermode: "closest", shapes: chart.shapes,
      dragmode: look.narrow ? false : "zoom",
      paper_bgcolor: get("paper"), plot_bgcolor: get("paper"),
      font: { family: get("text"), size: 12.5, color: look.ink },
      xaxis: axis(chart.x), yaxis: axis(chart.y),
      hoverlabel: {
        align: "left", bgcolor: get("wash"), bordercolor: get("rule"),
        font: { family: get("text"), size: 12, color: look.ink },
      },
      annotations: [...names, ...(chart.notes ?? [])],
    };
    Plotly.react(div, chart.data, layout, { displayModeBar: false });
  }

  const drawAll = () => Object.keys(CHARTS).forEach(draw);
  function print(on) {
    printing = on;
    document.documentElement.classList.toggle("printing", on);
    drawAll();
  }

  addEventListener("beforeprint", () => print(true));
  addEventListener("afterprint", () => print(false));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let drawn = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (printing || contentRect.width === drawn) return;
    drawn = contentRect.width;
    requestAnimationFrame(drawAll);
  }).observe(document.querySelector("main"));
})();
