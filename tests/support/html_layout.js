// What tests/test_html_report_browser.py asks of a laid-out page; `window` and `document` are the page's.

document.querySelectorAll("details").forEach(each => { each.open = true; });
const style = each => window.getComputedStyle(each);

/** The page's own width, what stands beyond its right edge other than in a box that scrolls, rows squeezed into towers. */
function widths() {
  const wide = [...document.body.querySelectorAll("*")].filter(each =>
    !each.closest(".scroll *, .skip, svg") && each.getBoundingClientRect().right > window.innerWidth + 0.5);
  return {
    inner: window.innerWidth,
    scroll: document.documentElement.scrollWidth,
    wide: wide.map(each => each.outerHTML.slice(0, 120)),
    tall: [...document.querySelectorAll("tr")].filter(each => each.offsetHeight > 400).map(each => each.textContent),
  };
}

/** Relative luminance and contrast as WCAG 2.2 defines them. */
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

/** The colour of the nearest opaque background. */
function behind(element) {
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
    const bar = parent.closest(".segment");
    const front = parent.closest("svg") ? style(parent).fill : style(parent).color;
    judge("text", text.slice(0, 40), front, bar ? style(bar.querySelector("rect")).fill : behind(parent));
  }
  for (const mark of document.querySelectorAll(".plot .accent, .plot .muted, .plot .gate, .plot .rule"))
    judge("mark", mark.getAttribute("class"), style(mark).stroke, behind(mark.closest("div, li")));
  return found;
}

/** Axes whose labels touch, and per cents that are wider than their part of a bar. */
function crowded() {
  const boxes = list => [...list].map(each => each.getBoundingClientRect()).filter(box => box.width);
  const touch = svg => {
    const found = boxes(svg.querySelectorAll("text")).sort((a, b) => a.left - b.left);
    return found.slice(1).some((box, at) => box.left < found[at].right + 4);
  };
  const width = each => each.getBoundingClientRect().width;
  const bars = [...document.querySelectorAll(".segment text")];
  return {
    axes: [...document.querySelectorAll(".axis svg")].filter(touch).map(svg => svg.textContent),
    bars: bars.filter(text => width(text) > width(text.parentElement.querySelector("rect")) - 4).map(text => text.textContent),
    labels: document.querySelectorAll(".axis text").length,
  };
}

/** [tabindex, is wider than its box, overflow] of every box that scrolls. */
function boxes() {
  return [...document.querySelectorAll(".scroll")].map(box =>
    [box.tabIndex, box.scrollWidth > box.clientWidth, style(box).overflowX]);
}
