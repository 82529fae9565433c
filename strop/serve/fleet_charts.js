// The charts of a simulation: stages and tiers as stacked bars, times as curves, load over time.
"use strict";
(() => {
  const { data, percent, plainNumber, linearScale, logScale, rule } = Charts;
  const DASHES = ["solid", "dash", "dot", "dashdot"];
  const policies = data.stages.rows.map((row) => row.policy);
  const clip = (text) => (text.length > 44 ? `${text.slice(0, 43)}…` : text);
  const plain = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const seconds = (value) => (value < 1 ? `${plainNumber(1000 * value)} ms` : `${+value.toPrecision(3)} s`);

  /** A bar a policy, its parts one behind the other; the policy's name and the sum stand above it. */
  const stacked = ({ names, rows }, title, format, total) => (look) => {
    const sums = rows.map((row) => row.parts.reduce((sum, part) => sum + part, 0));
    const whole = { to: (v) => v, range: [0, 1], axis: { title, tickformat: ".0%" } };
    const x = total ? linearScale(sums, title, true) : whole;
    const y = { to: (v) => v, range: [rows.length - 0.4, -0.75], axis: { title: "", tickvals: [] } };
    const before = rows.map(() => 0);
    const bars = names.map((name, part) => {
      const lengths = rows.map((row) => row.parts[part]);
      const base = [...before];
      lengths.forEach((length, row) => (before[row] += length));
      return {
        type: "bar", orientation: "h", x: lengths, y: rows.map((_, row) => row), base, offset: -0.22,
        width: 0.44, hoverinfo: "text", marker: { color: look.series[part % 8] },
        hovertext: lengths.map(
          (length, row) => `<b>${plain(rows[row].policy)}</b><br>${name}: ${format(length)}`
        ),
      };
    });
    const notes = rows.map((row, index) => ({
      x: 0, xanchor: "left", y: index - 0.24, yanchor: "bottom", showarrow: false, xshift: 2,
      text: plain(clip(row.policy)) + (total ? `: ${format(sums[index])}` : ""),
      font: { size: 12.5, color: look.ink },
    }));
    return { x, y, data: bars, notes, marks: [], named: [], shapes: [] };
  };

  const line = (x, y, name, index, look, hovertext) => ({
    type: "scatter", mode: "lines", x, y, hoverinfo: "text",
    hovertext: hovertext.map((text) => `<b>${plain(name)}</b><br>${text}`),
    line: { color: look.series[index % 8], width: 2, dash: DASHES[(index >> 3) % 4] },
  });

  function ttft(look) {
    const values = policies.flatMap((name) => data.ttft[name]);
    const x = logScale([...values, data.slo], "time to the first token (log)", seconds);
    const y = { to: (v) => v, range: [0, 1.02], axis: { title: "share of requests", tickformat: ".0%" } };
    const curves = policies.map((name, index) =>
      line(
        data.ttft[name].map(x.to), data.levels, name, index, look,
        data.ttft[name].map((value, k) => `${percent(data.levels[k])} within ${seconds(value)}`)
      )
    );
    return { x, y, data: curves, marks: [], named: [], shapes: [rule("x", x.to(data.slo), look, "dot")] };
  }

  const load = (stage) => (look) => {
    const x = linearScale(data.times, "seconds from the first arrival");
    const y = linearScale(policies.flatMap((name) => data.load[name][stage]), "requests", true);
    x.range = [data.times[0], data.times[data.times.length - 1]];
    const lines = policies.map((name, index) => {
      const counts = data.load[name][stage];
      const said = counts.map((count, k) => `${plainNumber(count)} at ${Math.round(data.times[k])} s`);
      return line(data.times, counts, name, index, look, said);
    });
    return { x, y, data: lines, marks: [], named: [], shapes: [] };
  };

  Charts.run({
    stages: stacked(data.stages, "seconds", seconds, true),
    tiers: stacked(data.tiers, "share of requests", percent, false),
    ttft,
    "load-prefill": load("prefill"), "load-transfer": load("transfer"), "load-decode": load("decode"),
  });
})();
