// What tests/report/test_html_page_browser.py asks of a laid-out page; `window` and `document` are the page's.

document.querySelectorAll("details").forEach(each => { each.open = true; });
const style = each => window.getComputedStyle(each);
const box = each => each.getBoundingClientRect();

/** The page's own width, what stands beyond its right edge other than in a box that scrolls, rows squeezed into towers. */
function widths() {
  const wide = [...document.body.querySelectorAll("*")].filter(each =>
    !each.closest(".scroll *, .skip") && box(each).right > window.innerWidth + 0.5);
  return {
    inner: window.innerWidth,
    scroll: document.documentElement.scrollWidth,
    wide: wide.map(each => each.outerHTML.slice(0, 120)),
    tall: [...document.querySelectorAll("tr")].filter(each => each.offsetHeight > 400).map(each => each.textContent),
  };
}

/** Contrast as WCAG 2.2 defines it. */
const channels = text => text.match(/[\d.]+/g).map(Number);
const linear = c => c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4;
function luminance(colour) {
  const [r, g, b] = channels(colour).map(linear);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}
function ratio(front, back) {
  const [less, more] = [luminance(front), luminance(back)].sort((a, b) => a - b);
  return (more + 0.05) / (less + 0.05);
}

/** The colour behind an element: of the bar of a chart that it is written on, else of the nearest opaque background. */
function behind(element) {
  const svg = element.closest("svg"), {left, right, top, bottom} = box(element);
  const x = (left + right) / 2, y = (top + bottom) / 2;
  const covers = each => style(each).fill !== "none" && box(each).left < x && x < box(each).right
    && box(each).top < y && y < box(each).bottom;
  const bar = svg && [...svg.querySelectorAll("g > path")].filter(covers).at(-1);
  if (bar && element.tagName === "text") return style(bar).fill;
  for (let at = element; at; at = at.parentElement) {
    const [, , , alpha = 1] = channels(style(at).backgroundColor);
    if (alpha > 0) return style(at).backgroundColor;
  }
  return "rgb(255, 255, 255)";
}

/** [kind, contrast, words] of every visible text and of every mark of a chart. */
function contrasts() {
  const found = [];
  const judge = (kind, what, front, back) => found.push([kind, ratio(front, back), `${what}: ${front} on ${back}`]);
  const walker = document.createTreeWalker(document.body, 4);
  while (walker.nextNode()) {
    const text = walker.currentNode.data.trim(), parent = walker.currentNode.parentElement;
    if (!text || !parent.getClientRects().length) continue;
    judge("text", text.slice(0, 40), parent.closest("svg") ? style(parent).fill : style(parent).color, behind(parent));
  }
  for (const mark of document.querySelectorAll(".plot use")) judge("mark", mark.outerHTML, style(mark).stroke, behind(mark));
  return found;
}

/** Labels of charts that lie over each other, and how many there are. */
function crowded() {
  const pairs = [];
  for (const svg of document.querySelectorAll(".plot")) {
    const labels = [...svg.querySelectorAll("text")].map(text => [text.textContent, box(text)]);
    labels.forEach(([words, a], at) => labels.slice(at + 1).forEach(([others, b]) => {
      if (a.left < b.right && b.left < a.right && a.top + 2 < b.bottom && b.top + 2 < a.bottom) pairs.push([words, others]);
    }));
  }
  return {pairs, labels: document.querySelectorAll(".plot text").length};
}

/** [tabindex, is wider than its box, overflow] of every box that scrolls. */
function boxes() {
  return [...document.querySelectorAll(".scroll")].map(each =>
    [each.tabIndex, each.scrollWidth > each.clientWidth, style(each).overflowX]);
}
