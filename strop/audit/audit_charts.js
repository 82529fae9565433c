// The charts of an audit: features by correlation, firing rate and peak; loss against features.
"use strict";
(() => {
  const { data, percent, plainNumber, linearScale, logScale, series, rule } = Charts;
  const unit = (title) => ({
    to: (value) => value, range: [-0.03, 1.03],
    axis: { title, tickvals: [0, 0.25, 0.5, 0.75, 1] },
  });

  function rho(look) {
    const { edges, counts } = data.histogram;
    const centres = counts.map((_, index) => (edges[index] + edges[index + 1]) / 2);
    const color = (value) =>
      value > data.survived ? look.accent : value < data.damaged ? look.warn : look.quiet;
    const bars = {
      type: "bar", x: centres, y: counts, width: edges[1] - edges[0], hoverinfo: "text",
      hovertext: counts.map(
        (count, index) => `${count} features from ${+edges[index].toFixed(3)} to ${+edges[index + 1].toFixed(3)}`
      ),
      marker: { color: centres.map(color) },
    };
    const x = unit("correlation before and after");
    const y = linearScale(counts, "features", true);
    return { x, y, data: [bars], marks: [], named: [], shapes: [] };
  }

  /** Features by one of their properties, and the share that survived in equal groups of them. */
  const by = (name, title, format) => (look) => {
    const { points } = data;
    const marks = points.rho.map((value, index) => ({
      x: points[name][index], y: Math.max(value, 0),
      point: {
        label: `feature ${points.feature[index]}`,
        hover: [`correlation ${plainNumber(value)}`, `${title} ${format(points[name][index])}`],
      },
    }));
    const groups = data.deciles[name].map((group) => ({
      x: Math.sqrt(group.low * group.high), y: group.survived,
      point: {
        label: `${group.features} features`,
        hover: [`survived ${percent(group.survived)}`, `${format(group.low)} to ${format(group.high)}`],
      },
    }));
    const x = logScale(points[name], `${title} before (log)`, format);
    const y = unit("correlation (dots), share survived (line)");
    const dots = series(marks, x, y, { size: 4, color: look.quiet, opacity: 0.35 }, look);
    const line = series(groups, x, y, { size: 8, color: look.accent }, look);
    return {
      x, y, marks: [], named: [], shapes: [rule("y", data.survived, look, "dot")],
      data: [dots, { ...line, mode: "lines+markers", line: { color: look.accent, width: 2 } }],
    };
  };

  function discordance(look) {
    const marks = data.discordance.map((row) => ({
      x: row.rise[0], y: row.survived[0], low: row.survived[1], high: row.survived[2],
      point: {
        label: row.name,
        hover: [`loss rise ${plainNumber(row.rise[0])} nats`, `survived ${percent(row.survived[0])}`],
      },
    }));
    const x = linearScale([0, ...marks.map((mark) => mark.x)], "loss rise, nats a token");
    const y = unit("share survived");
    return {
      x, y, marks, shapes: [rule("x", 0, look, "dot")],
      named: marks.map((mark, index) => ({ mark, name: mark.point.label, bold: index === 0 })),
      data: [series(marks, x, y, { size: 10, color: look.accent }, look)],
    };
  }

  Charts.run({
    rho, discordance,
    rate: by("rate", "firing rate", percent),
    peak: by("peak", "peak", plainNumber),
  });
})();
