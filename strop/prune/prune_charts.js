// The charts of a pruning run: what units lose alone by rate; accuracy against size.
"use strict";
(() => {
  const { data, SYMBOLS, percent, linearScale, series, rule } = Charts;
  const paint = (name) =>
    getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  // Plotly reads tags and entities in its texts.
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const tenths = (value) => `${(100 * value).toFixed(1)} %`;
  const points = (value) => `${(100 * value).toFixed(2)} points`;

  /** A colour so far on the way from one of the page's colours to another. */
  function mixed(from, to, share) {
    const parts = (name) => paint(name).match(/[0-9a-f]{2}/gi).map((digits) => parseInt(digits, 16));
    const ends = [parts(from), parts(to)];
    return `rgb(${ends[0].map((part, index) => Math.round(part + share * (ends[1][index] - part))).join()})`;
  }

  /** Cells are shapes, since plotly paints its own heat maps as images, which the page forbids. */
  function heat(look) {
    if (!data.heat) return null;
    const { units, rates, drops } = data.heat;
    const within = data.tolerance ?? Infinity;
    const top = Math.max(...drops.flat().filter(Charts.known), 1e-6);
    const cells = units.flatMap((unit, y) => rates.map((rate, x) => ({ unit, rate, x, y, lost: drops[y][x] })))
      .filter((cell) => Charts.known(cell.lost));
    const beyond = (lost) => lost > within + 1e-9;
    const depth = (lost) => (beyond(lost)
      ? 0.35 + 0.65 * ((lost - within) / (top - within || 1))
      : 0.08 + 0.5 * (Math.max(0, lost) / (Math.min(within, top) || 1)));
    const shapes = cells.map(({ x, y, lost }) => ({
      type: "rect", layer: "below", x0: x - 0.49, x1: x + 0.49, y0: y - 0.46, y1: y + 0.46, line: { width: 0 },
      fillcolor: mixed("paper", beyond(lost) ? "warn" : "accent", depth(lost)),
    }));
    const words = {
      type: "scatter", mode: "text", x: cells.map((cell) => cell.x), y: cells.map((cell) => cell.y),
      hoverinfo: "text", text: cells.map(({ lost }) => (100 * lost).toFixed(1)),
      textfont: { color: cells.map(({ lost }) => (depth(lost) > 0.55 ? paint("paper") : look.ink)), size: 12 },
      hovertext: cells.map(({ unit, rate, lost }) =>
        `${plain(unit)}<br>cut by ${percent(rate)}: ${points(lost)} of accuracy`),
    };
    const name = (text) => plain(look.narrow && text.length > 18 ? `…${text.slice(-17)}` : text);
    const scale = (count) => ({ to: (value) => value, range: [-0.5, count - 0.5] });
    const [x, y] = [scale(rates.length), scale(units.length)];
    y.range.reverse();
    const at = (list) => list.map((_, index) => index);
    x.axis = { title: "share of the unit's channels cut", tickvals: at(rates), ticktext: rates.map(percent) };
    y.axis = { title: "", tickvals: at(units), ticktext: units.map(name), automargin: true };
    x.axis.showgrid = y.axis.showgrid = false;
    return { x, y, data: [words], marks: [], named: [], shapes };
  }

  function size(look) {
    const names = data.order;
    const lines = names.map((name) => data.curves[name].map((one) => ({
      x: one.saving, y: one.accuracy,
      point: {
        label: data.names[name] + (one.rate ? `: ${one.what} cut by ${percent(one.rate)}` : ""),
        hover: [`saved ${tenths(one.saving)}`, `accuracy ${tenths(one.accuracy)}`],
      },
    })));
    const { chosen } = data;
    const star = {
      x: chosen.saving, y: chosen.accuracy,
      point: {
        label: "chosen", hover: [`saved ${tenths(chosen.saving)}`, `accuracy ${tenths(chosen.accuracy)}`],
      },
    };
    const marks = [...lines.flat(), star];
    const x = linearScale([0, ...marks.map((mark) => mark.x)], "share of the parameters saved");
    const y = linearScale([data.dense, ...marks.map((mark) => mark.y)], "accuracy, planning part");
    x.axis.tickformat = y.axis.tickformat = ".2~%";
    const drawn = lines.map((line, index) => ({
      ...series(line, x, y, { size: 7, color: look.series[index], symbol: SYMBOLS[index] }, look),
      mode: "lines+markers", line: { color: look.series[index], width: 1.5 },
    }));
    const limits = [];
    if (Charts.known(data.tolerance)) limits.push(rule("y", data.dense - data.tolerance, look, "dot"));
    if (Charts.known(data.saving)) limits.push(rule("x", data.saving, look, "dot"));
    return {
      x, y, marks, shapes: limits, named: [{ mark: star, name: "chosen", bold: true }],
      data: [...drawn, series([star], x, y, { size: 15, color: look.ink, symbol: "star" }, look)],
    };
  }

  Charts.run({ heat, size });
})();
