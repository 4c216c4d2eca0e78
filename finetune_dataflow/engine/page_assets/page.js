"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, where = document) => [...where.querySelectorAll(selector)];
  const json = (element) => JSON.parse(element.textContent);
  const count = (number) => number.toLocaleString("en");
  root.classList.add("js");

  // Theme: the system's, until the button is used. Storage may be refused on file://.
  const themes = json(document.getElementById("themes"));
  const systemDark = matchMedia("(prefers-color-scheme: dark)");
  const place = `theme of ${location.pathname}`;
  const remembered = (theme) => {
    try {
      if (theme) sessionStorage.setItem(place, theme);
      return sessionStorage.getItem(place);
    } catch {
      return null;
    }
  };
  const theme = () => root.dataset.theme || (systemDark.matches ? "dark" : "light");
  const themeButton = document.querySelector(".theme");
  const showTheme = () => {
    const other = theme() === "dark" ? "light" : "dark";
    themeButton.textContent = other === "dark" ? "Dark theme" : "Light theme";
    themeButton.dataset.other = other;
    if (!printing) charts.forEach((chart) => chart.colour(theme()));
  };

  // Charts: the library is unpacked once, each figure drawn when it comes near.
  let library = null;
  let loading = null;
  const unpack = async () => {
    if (!("DecompressionStream" in window)) {
      throw new Error("This browser cannot unpack the charts. Chrome 80, Firefox 113, Safari 16.4 and later can.");
    }
    const packed = atob(document.getElementById("plotly").textContent);
    const bytes = new Uint8Array(packed.length);
    for (let place = 0; place < packed.length; place++) bytes[place] = packed.charCodeAt(place);
    const inflated = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    const script = document.createElement("script");
    script.textContent = await new Response(inflated).text();
    document.head.append(script); // the policy knows it by its hash
    if (!window.Plotly) throw new Error("This browser refused to run the chart library.");
    library = window.Plotly;
  };
  const load = () => (loading ??= unpack());

  // A layout as plotly's dotted paths; what is said of an axis is said of every axis of the letter.
  const paths = (layout, axes, prefix = "") =>
    Object.entries(layout).flatMap(([key, value]) => {
      const nested = value && typeof value === "object" && !Array.isArray(value) && prefix + key !== "template";
      if (nested) return paths(value, axes, `${prefix}${key}.`);
      const [axis, rest] = (prefix + key).split(/\.(.*)/s);
      const names = rest && /^[xy]axis$/.test(axis) ? new Set([axis, ...axes.filter((each) => each.startsWith(axis))]) : [axis];
      return [...names].map((name) => [rest ? `${name}.${rest}` : name, value]);
    });
  const merged = (layout, changes) => {
    const copy = structuredClone(layout);
    for (const [path, value] of changes) {
      const keys = path.split(".");
      const last = keys.pop();
      let inner = copy;
      for (const key of keys) inner = inner[key] ??= {};
      inner[last] = value;
    }
    return copy;
  };

  // On a phone the legend lies above the plot, not beside it, unless the figure says where.
  const NARROW = Object.entries({
    "legend.orientation": "h", "legend.x": 0, "legend.xanchor": "left", "legend.y": 1.02, "legend.yanchor": "bottom",
    "margin.l": 50, "margin.r": 14, "font.size": 11,
  });

  class Chart {
    constructor(figure) {
      this.plot = figure.querySelector(".plot");
      this.instead = figure.querySelector(".instead");
      this.instead.classList.add("waiting");
      this.spec = json(figure.querySelector("script"));
      this.axes = Object.keys(this.spec.layout).filter((key) => /^[xy]axis\d*$/.test(key));
      this.drawn = false;
      this.failed = false;
    }
    changes(name) {
      // A theme with a template has letters of its own, by which it may have measured its texts.
      const font = themes[name].template ? [] : [["font.family", getComputedStyle(document.body).fontFamily]];
      return [...font, ...this.narrow, ...paths(themes[name], this.axes)];
    }
    draw(name = theme()) {
      if (this.drawn || this.failed) return;
      this.drawn = true;
      const unsaid = ([path]) => !(path.split(".")[0] in this.spec.layout);
      this.narrow = this.plot.clientWidth < 480 ? NARROW.filter(unsaid) : [];
      this.instead.remove();
      const layout = { autosize: true, ...merged(this.spec.layout, this.changes(name)) };
      const config = {
        responsive: true,
        displaylogo: false,
        showLink: false,
        plotlyServerURL: "",
        modeBarButtonsToRemove: ["sendDataToCloud", "lasso2d", "select2d"],
      };
      const fail = (error) => this.fail(new Error(`This chart could not be drawn: ${error.message}`));
      try {
        library.newPlot(this.plot, this.spec.data, layout, config).catch(fail); // it throws, or it rejects
      } catch (error) {
        fail(error);
      }
    }
    colour(name) {
      if (this.drawn) library.relayout(this.plot, Object.fromEntries(this.changes(name)));
    }
    fail(error) {
      const message = document.createElement("strong");
      message.textContent = error.message;
      this.failed = true;
      this.drawn = false;
      this.instead.classList.remove("waiting");
      this.instead.prepend(message);
      library?.purge(this.plot);
      this.plot.replaceChildren(this.instead);
      console.error(error);
    }
  }
  const charts = all(".chart").map((figure) => new Chart(figure));
  const near = new IntersectionObserver(
    (entries) => {
      for (const entry of entries.filter((each) => each.isIntersecting)) {
        near.unobserve(entry.target);
        const chart = charts.find((each) => each.plot === entry.target);
        load().then(() => chart.draw(printing ? "light" : theme()));
      }
    },
    { rootMargin: "400px 0px" },
  );
  if (charts.length) {
    load().catch((error) => charts.forEach((chart) => chart.fail(error)));
    charts.forEach((chart) => near.observe(chart.plot));
  }

  // Tables: rows are moved in and out whole; no text of theirs is ever parsed.
  const folded = (text) => text.normalize("NFC").toLowerCase();
  const collator = new Intl.Collator(undefined, { numeric: true, sensitivity: "base" });
  const cellText = (cell) => {
    const copy = cell.cloneNode(true);
    all("del, button", copy).forEach((each) => each.remove());
    return copy.textContent;
  };
  const compared = (one, two, numeric, direction) => {
    if (!numeric) return direction * collator.compare(one, two);
    if (one === "" || two === "") return (one === "") - (two === "");
    return direction * (Number(one) - Number(two));
  };

  class DataTable {
    constructor(box) {
      this.box = box;
      this.body = box.querySelector("tbody");
      this.rows = [...this.body.rows];
      this.size = Number(box.dataset.size);
      this.page = 0;
      this.column = null;
      this.direction = 1;
      this.texts = new Map();
      this.search = box.querySelector("input[type=search]");
      this.pager = box.querySelector(".pager");
      this.status = box.querySelector(".status");
      this.heads = all("thead th", box);
      this.heads.forEach((head, column) => this.sortable(head, column));
      this.search?.addEventListener("input", () => this.show(0));
      all("input[type=radio]", box).forEach((each) => each.addEventListener("change", () => this.show(0)));
      box.querySelector(".marking input")?.addEventListener("change", (event) => {
        box.classList.toggle("unmarked", !event.target.checked);
      });
      all("[data-step]", box).forEach((button) =>
        button.addEventListener("click", () => {
          if (button.getAttribute("aria-disabled") === "true") return;
          this.show(this.page + Number(button.dataset.step));
          const top = box.querySelector(".scroll").getBoundingClientRect().top;
          if (top < 0) box.scrollIntoView();
        }),
      );
      this.show(0);
    }
    sortable(head, column) {
      if (!("sort" in head.dataset)) return;
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      head.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => this.sort(column));
    }
    sort(column) {
      if (this.column !== column) [this.column, this.direction] = [column, 1];
      else if (this.direction === 1) this.direction = -1;
      else this.column = null;
      this.heads.forEach((head, place) => {
        const state = place !== this.column ? "none" : this.direction === 1 ? "ascending" : "descending";
        if ("sort" in head.dataset) head.setAttribute("aria-sort", state);
      });
      this.show(0);
    }
    text(row) {
      if (!this.texts.has(row)) this.texts.set(row, folded([...row.cells].map(cellText).join("\n")));
      return this.texts.get(row);
    }
    matching() {
      const wanted = this.box.querySelector("input[type=radio]:checked")?.value ?? "all";
      const query = folded(this.search?.value.trim() ?? "");
      const rows = this.rows.filter(
        (row) => (wanted === "all" || row.classList.contains(wanted)) && (!query || this.text(row).includes(query)),
      );
      if (this.column === null) return rows;
      const numeric = this.heads[this.column].classList.contains("num");
      const key = (row) => (numeric ? row.cells[this.column].dataset.v : cellText(row.cells[this.column]));
      const keyed = rows.map((row) => [key(row), row]);
      return keyed.sort((one, two) => compared(one[0], two[0], numeric, this.direction)).map((each) => each[1]);
    }
    show(page, everything = false) {
      const rows = this.matching();
      const pages = Math.max(Math.ceil(rows.length / this.size), 1);
      this.page = Math.min(Math.max(page, 0), pages - 1);
      const start = everything ? 0 : this.page * this.size;
      const end = everything ? rows.length : Math.min(start + this.size, rows.length);
      this.body.replaceChildren(...rows.slice(start, end));
      const of = rows.length === this.rows.length ? "" : ` (of ${count(this.rows.length)})`;
      const some = rows.length ? `Rows ${count(start + 1)}–${count(end)} of ${count(rows.length)}${of}` : `No row matches${of}`;
      if (this.search || this.pager) this.status.textContent = some;
      if (this.pager) {
        this.pager.hidden = pages === 1;
        this.pager.querySelector("span").textContent = `Page ${count(this.page + 1)} of ${count(pages)}`;
        const [previous, next] = all("button", this.pager);
        previous.setAttribute("aria-disabled", this.page === 0);
        next.setAttribute("aria-disabled", this.page === pages - 1);
      }
      highlight();
    }
    ranges() {
      const query = folded(this.search?.value.trim() ?? "");
      if (!query) return [];
      const ranges = [];
      const walker = document.createTreeWalker(this.body, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const text = walker.currentNode.data.toLowerCase();
        if (text.length !== walker.currentNode.data.length) continue;
        for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) {
          const range = new Range();
          range.setStart(walker.currentNode, at);
          range.setEnd(walker.currentNode, at + query.length);
          ranges.push(range);
        }
      }
      return ranges;
    }
  }
  const tables = [];
  const highlight = () => {
    if (CSS.highlights) CSS.highlights.set("found", new Highlight(...tables.flatMap((table) => table.ranges())));
  };

  // Printing: everything open, every matching row, charts in light colours and of the paper's width.
  let printing = false;
  let opened = [];
  const beforePrint = () => {
    if (printing) return;
    printing = true;
    opened = all("details:not([open])");
    opened.forEach((each) => (each.open = true));
    tables.forEach((table) => table.show(table.page, true));
    if (library) {
      for (const chart of charts) {
        chart.draw("light");
        const paper = { ...Object.fromEntries(chart.changes("light")), autosize: false, width: 660 };
        if (chart.drawn) library.relayout(chart.plot, paper);
      }
    }
  };
  const afterPrint = () => {
    if (!printing) return;
    printing = false;
    opened.forEach((each) => (each.open = false));
    tables.forEach((table) => table.show(table.page));
    charts.filter((chart) => chart.drawn).forEach((chart) => {
      const width = chart.spec.layout.width ?? null;
      library.relayout(chart.plot, { ...Object.fromEntries(chart.changes(theme())), autosize: width === null, width });
    });
  };
  addEventListener("beforeprint", beforePrint);
  addEventListener("afterprint", afterPrint);
  matchMedia("print").addEventListener("change", (event) => (event.matches ? beforePrint() : afterPrint()));

  all(".table").forEach((box) => tables.push(new DataTable(box)));
  const scrollers = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
      else target.removeAttribute("tabindex");
    }
  });
  all(".table:not(.rows) .scroll").forEach((each) => scrollers.observe(each));

  // Folded texts and copies.
  const copied = async (source) => {
    try {
      await navigator.clipboard.writeText(source.textContent);
      return true;
    } catch {
      getSelection().selectAllChildren(source);
      return document.execCommand("copy");
    }
  };
  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (button?.matches(".more")) {
      const open = button.previousElementSibling.classList.toggle("open");
      button.setAttribute("aria-expanded", open);
      button.textContent = open ? "Show less" : "Show all";
    } else if (button?.matches(".copy")) {
      const done = await copied(button.closest(".code").querySelector("code"));
      button.textContent = done ? "Copied" : "Selected";
      setTimeout(() => (button.textContent = "Copy"), 2000);
    }
  });

  // Drawings.
  for (const drawing of all(".drawing")) {
    const canvas = drawing.querySelector(".canvas");
    const svg = canvas.querySelector("svg");
    const zoom = (factor) => {
      const width = svg.getBoundingClientRect().width;
      canvas.classList.toggle("scaled", factor !== 0);
      const middle = (canvas.scrollLeft + canvas.clientWidth / 2) / canvas.scrollWidth;
      svg.style.width = factor ? `${Math.min(Math.max(width * factor, 80), 20000)}px` : "";
      canvas.scrollLeft = middle * canvas.scrollWidth - canvas.clientWidth / 2;
    };
    const factors = { in: 1.4, out: 1 / 1.4, fit: 0 };
    const keys = { "+": 1.4, "=": 1.4, "-": 1 / 1.4, 0: 0 };
    all("[data-zoom]", drawing).forEach((button) => button.addEventListener("click", () => zoom(factors[button.dataset.zoom])));
    canvas.addEventListener("keydown", (event) => {
      if (event.key in keys && !event.ctrlKey && !event.metaKey) zoom(keys[event.key]);
    });
  }

  // The index shows where one is; a link to a collapsed section opens it.
  const index = document.querySelector("nav");
  const links = new Map(all("a", index).map((link) => [link.hash.slice(1), link]));
  const sections = all(".part");
  let waiting = false;
  const mark = () => {
    waiting = false;
    const atEnd = innerHeight + scrollY >= root.scrollHeight - 2;
    const passed = sections.filter((each) => each.getBoundingClientRect().top < innerHeight * 0.3);
    const current = atEnd ? sections.at(-1) : passed.at(-1);
    links.forEach((link, id) => {
      if (id !== current?.id) return link.removeAttribute("aria-current");
      link.setAttribute("aria-current", "true");
      index.scrollLeft = link.offsetLeft - (index.clientWidth - link.offsetWidth) / 2;
    });
  };
  const markSoon = () => {
    if (!waiting) requestAnimationFrame(mark);
    waiting = true;
  };
  const reveal = () => {
    const details = document.getElementById(location.hash.slice(1))?.querySelector(":scope > details");
    if (details) details.open = true;
  };
  addEventListener("scroll", markSoon, { passive: true });
  addEventListener("hashchange", reveal);
  index.addEventListener("click", () => setTimeout(reveal));
  themeButton.addEventListener("click", () => {
    root.dataset.theme = themeButton.dataset.other;
    remembered(root.dataset.theme);
    showTheme();
  });
  systemDark.addEventListener("change", showTheme);
  root.dataset.theme = remembered() ?? "";
  if (!root.dataset.theme) delete root.dataset.theme;
  showTheme();
  reveal();
  mark();
})();
