"use strict";
(() => {
  const said = document.getElementById("said");
  const say = (words) => { said.textContent = words; };

  // Which column each table is sorted by; kept here, since a live page's tables are replaced.
  const sorted = new Map();
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (one, other) => {
    const [a, b] = [Number(one), Number(other)];
    return Number.isNaN(a) || Number.isNaN(b) ? one.localeCompare(other, "en", { numeric: true }) : a - b;
  };
  const sort = (table, column, descending) => {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row, index) => ({ row, index, key: value(row, column) }));
    rows.sort((a, b) => {
      // Rows without a figure stay at the end in both directions.
      if ((a.key === "") !== (b.key === "")) return a.key === "" ? 1 : -1;
      const order = compare(a.key, b.key);
      return (descending ? -order : order) || a.index - b.index;
    });
    body.append(...rows.map((entry) => entry.row));
    [...table.tHead.rows[0].cells].forEach((cell, index) => {
      cell.setAttribute("aria-sort", index !== column ? "none" : descending ? "descending" : "ascending");
    });
  };

  const copy = async (button) => {
    const text = button.parentElement.querySelector("code").textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
      button.focus();
    }
    say("The command is copied.");
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };

  document.addEventListener("click", (event) => {
    const button = event.target.closest("button, #download");
    if (!button) return;
    if (button.matches(".copy")) copy(button);
    if (button.matches(".sort")) {
      const cell = button.closest("th");
      const table = cell.closest("table");
      const descending = cell.getAttribute("aria-sort") === "ascending";
      sorted.set(table.id, [cell.cellIndex, descending]);
      sort(table, cell.cellIndex, descending);
      say(`Sorted by ${button.textContent}, ${descending ? "descending" : "ascending"}.`);
    }
    if (button.id === "download") {
      const text = document.getElementById("document").textContent;
      const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
      button.href = address;
      setTimeout(() => { URL.revokeObjectURL(address); button.href = "#document"; }, 1000);
    }
  });

  // Printed pages show what is folded.
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details:not([open])").forEach((one) => { one.open = true; one.dataset.shut = ""; });
  });
  addEventListener("afterprint", () => {
    document.querySelectorAll("details[data-shut]").forEach((one) => { one.open = false; delete one.dataset.shut; });
  });

  if (!("live" in document.body.dataset)) return;

  // As the server wrote each part: only what has changed is replaced, so that nothing flickers.
  const written = new Map();
  const parts = (root) => [...root.querySelectorAll("main > [id]")];
  parts(document).forEach((part) => written.set(part.id, part.outerHTML));

  const carried = (from, to) => {
    from.querySelectorAll("details[id]").forEach((one) => {
      const other = to.querySelector(`#${CSS.escape(one.id)}`);
      if (other) other.open = one.open;
    });
    to.querySelectorAll("table[id]").forEach((table) => {
      const by = sorted.get(table.id);
      if (by) sort(table, ...by);
    });
  };
  const focused = (part) => {
    const active = document.activeElement;
    return part.contains(active) ? [...part.querySelectorAll("button, a, summary, [tabindex]")].indexOf(active) : -1;
  };
  const scrolls = (part) => [...part.querySelectorAll(".scrolls")];

  const replace = (part, fresh) => {
    carried(part, fresh);
    const [at, offsets] = [focused(part), scrolls(part).map((box) => [box.scrollLeft, box.scrollTop])];
    part.replaceWith(fresh);
    scrolls(fresh).forEach((box, index) => { if (offsets[index]) [box.scrollLeft, box.scrollTop] = offsets[index]; });
    if (at >= 0) [...fresh.querySelectorAll("button, a, summary, [tabindex]")][at]?.focus({ preventScroll: true });
  };

  const show = (html) => {
    const page = new DOMParser().parseFromString(html, "text/html");
    const main = document.getElementById("main");
    const fresh = parts(page);
    const names = new Set(fresh.map((part) => part.id));
    parts(document).filter((part) => !names.has(part.id)).forEach((part) => { part.remove(); written.delete(part.id); });
    let before = null;
    for (const part of fresh) {
      const text = part.outerHTML;
      const old = document.getElementById(part.id);
      if (!old) {
        const adopted = document.adoptNode(part);
        carried(adopted, adopted);
        if (before) before.after(adopted); else main.prepend(adopted);
        before = adopted;
      } else if (written.get(part.id) !== text) {
        const adopted = document.adoptNode(part);
        replace(old, adopted);
        before = adopted;
      } else before = old;
      written.set(part.id, text);
    }
    document.title = page.title;
    document.getElementById("document").textContent = page.getElementById("document").textContent;
  };

  const advance = (html) => {
    const part = document.getElementById("progress");
    const fresh = new DOMParser().parseFromString(html, "text/html").getElementById("progress");
    if (!part || !fresh) return;
    written.set("progress", fresh.outerHTML);
    part.replaceWith(document.adoptNode(fresh));
  };

  const ended = (words) => {
    const line = document.querySelector("#progress .left");
    if (line) { line.textContent = words; delete line.dataset.left; }
    say(words);
  };
  let version = -1;
  const listen = async () => {
    let failures = 0;
    while (true) {
      try {
        const update = await (await fetch(`next?after=${version}`, { cache: "no-store" })).json();
        failures = 0;
        version = update.version;
        if (update.html) show(update.html);
        if (update.progress) advance(update.progress);
        if (update.ended) { say("The comparison is finished."); return; }
      } catch {
        if (++failures > 3) { ended("The run has ended, and its server with it; this is the last that it sent."); return; }
        await new Promise((done) => setTimeout(done, 500 * failures));
      }
    }
  };
  listen();

  const told = (seconds) => seconds < 90 ? `${Math.round(seconds)} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
  setInterval(() => {
    const line = document.querySelector("#progress .left[data-left]");
    if (!line) return;
    const seconds = Number(line.dataset.left) - 1;
    if (!(seconds >= 0)) return;
    line.dataset.left = String(seconds);
    line.textContent = `at most ${told(seconds)} left`;
  }, 1000);
})();
