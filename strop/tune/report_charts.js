// The charts of a study: recipes by memory, time and quality, KV cache methods by bytes.
"use strict";
(() => {
  const {
    SYMBOLS, known, percent, plainNumber, bytes, linearScale, logScale, series, rule,
  } = Charts;
  const { points, max_drop: maxDrop } = Charts.data;

  /** Marks that no other mark beats in both directions of this chart, from left to right. */
  function lowerLeft(marks) {
    let best = Infinity;
    const ordered = [...marks].sort((a, b) => a.x - b.x || a.y - b.y);
    return ordered.filter((m) => m.y < best && ((best = m.y), true));
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

  Charts.run(CHARTS);
})();
