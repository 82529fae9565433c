// Draws charts in the colours of the page, again whenever its width or its colours change.
// Axes are linear for plotly: a logarithmic scale maps its values itself, so that zero has a place.
"use strict";
const Charts = (() => {
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

  function draw(id, build) {
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
    const chart = build(look);
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

  /** Draw these charts, by the ids of their places, whenever there is a reason to. */
  function run(charts) {
    const drawAll = () => Object.entries(charts).forEach(([id, build]) => draw(id, build));
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
  }

  const data = JSON.parse(document.getElementById("charts").textContent);
  return {
    data, SYMBOLS, known, percent, plainNumber, bytes, linearScale, logScale, series, rule, run,
  };
})();
