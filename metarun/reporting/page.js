// A click on a column's heading sorts its table; another one turns the order round.
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const heading = button.parentElement;
      const ascending = heading.getAttribute("aria-sort") !== "ascending";
      for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const body = table.tBodies[0];
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [a, b].map((row) => row.cells[column].dataset);
        const numbers = Number("number" in x) + Number("number" in y);
        if (numbers === 1) return "number" in x ? -1 : 1; // a gap is last either way
        const order = numbers === 2
          ? Number(x.number) - Number(y.number)
          : x.text.localeCompare(y.text, undefined, { numeric: true });
        return ascending ? order : -order;
      });
      body.append(...rows);
    });
  });
}
