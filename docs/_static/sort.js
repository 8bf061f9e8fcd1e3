// Tables of results sort by a click on a heading, and back by another.
"use strict";

// What a cell is worth: its first number (a comma parts thousands), or else its text.
function worth(cell) {
  const text = cell.textContent.trim();
  const number = text.replace(/,(?=\d{3})/g, "").replace("−", "-").match(/^[^\d-]*(-?\d+(\.\d+)?(e[+-]?\d+)?)/i);
  return number ? parseFloat(number[1]) : text;
}

function sort(table, column, down) {
  const body = table.tBodies[0];
  const keyed = [...body.rows].map((row) => [worth(row.cells[column]), row]);
  keyed.sort(([a], [b]) => {
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // what has no number comes last
    return (down ? -1 : 1) * (typeof a === "number" ? a - b : a.localeCompare(b));
  });
  keyed.forEach(([, row]) => body.append(row));
}

for (const table of document.querySelectorAll("#results table, #results ~ section table")) {
  if (!table.tHead || !table.tBodies.length) continue;
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.tabIndex = 0;
    head.classList.add("sortable");
    const turn = () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      [...table.tHead.rows[0].cells].forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(table, column, down);
    };
    head.addEventListener("click", turn);
    head.addEventListener("keydown", (event) => event.key === "Enter" && turn());
  });
}
