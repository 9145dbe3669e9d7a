// A click on a column's head sorts its table: numbers by value, the rest by name.
for (const button of document.querySelectorAll("th button")) {
  button.addEventListener("click", () => {
    const head = button.parentElement, body = head.closest("table").tBodies[0], column = head.cellIndex;
    const down = head.ariaSort === "descending", number = (cell) => parseFloat(cell.replaceAll(",", ""));
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.ariaSort = down ? "ascending" : "descending";
    const order = (a, b) => (isNaN(number(a)) || isNaN(number(b)) ? a.localeCompare(b) : number(a) - number(b));
    const rows = [...body.rows].sort((a, b) => order(a.cells[column].textContent, b.cells[column].textContent));
    body.append(...(down ? rows : rows.reverse()));
  });
}
