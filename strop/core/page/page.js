// Sorts the tables and copies text.
"use strict";
(() => {
  function sortBy(table, header) {
    const column = header.cellIndex, numeric = header.classList.contains("number");
    const sign = header.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    const key = (row) => row.cells[column].dataset.sort;
    const compare = (a, b) => (numeric ? a - b : a.localeCompare(b, "en", { numeric: true }));
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [left, right] = [key(a), key(b)];
      if (left === "" || right === "") return (left === "") - (right === "");
      return sign * compare(left, right);
    });
    table.tBodies[0].append(...rows);
    for (const other of header.parentNode.querySelectorAll("[aria-sort]"))
      other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  }

  function copyByHand(text) {
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "unseen";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }

  async function copy(button) {
    const text = button.dataset.copy;
    const done = await navigator.clipboard?.writeText(text).then(() => true, () => copyByHand(text))
      ?? copyByHand(text);
    button.textContent = done ? "Copied" : "Not copied";
    document.getElementById("said").textContent = button.textContent;
    button.focus();
    setTimeout(() => (button.textContent = "Copy"), 1600);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (button?.matches(".copy")) copy(button);
    else if (button?.closest("[aria-sort]")) sortBy(button.closest("table"), button.closest("th"));
  });
})();
