// Markdown to elements, without HTML strings: text of a model only ever becomes text nodes.
//
// A source is a string and, for each of its characters, whether it was drafted. Every function works
// on a range of the source, so that a text node knows which of its characters to tint.

const FENCE = /^ {0,3}(```|~~~)/;
const HEADING = /^ {0,3}(#{1,6}) +/;
const BULLET = /^( *)([-*+]|\d{1,9}[.)]) +/;
const QUOTE = /^ {0,3}> ?/;
// In this order: code, bold, emphasis, a link.
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+(?:\*[^*\n]+)*)\*\*|\*([^\s*][^*\n]*)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/g;

export function renderMarkdown(parent, source) {
  parent.replaceChildren();
  blocks(parent, source, linesOf(source.text));
}

export function renderPlain(parent, source) {
  parent.replaceChildren();
  appendText(parent, source, 0, source.text.length);
}

// Lines as [start, end) of the source; the start may be moved past a marker.
function linesOf(text) {
  const lines = [];
  let start = 0;
  for (let end = text.indexOf("\n"); end >= 0; end = text.indexOf("\n", start)) {
    lines.push({ start, end });
    start = end + 1;
  }
  lines.push({ start, end: text.length });
  return lines;
}

function blocks(parent, source, lines) {
  const at = (line) => source.text.slice(line.start, line.end);
  let i = 0;
  while (i < lines.length) {
    const text = at(lines[i]);
    let found;
    if (!text.trim()) {
      i += 1;
    } else if ((found = FENCE.exec(text))) {
      i = code(parent, source, lines, i, found[1]);
    } else if ((found = HEADING.exec(text))) {
      const level = Math.min(5, 2 + found[1].length); // the page itself has h1 and h2
      inline(append(parent, `h${level}`), source, lines[i].start + found[0].length, lines[i].end);
      i += 1;
    } else if (QUOTE.test(text)) {
      const inner = take(lines, i, (line) => QUOTE.test(at(line)));
      i += inner.length;
      blocks(append(parent, "blockquote"), source, inner.map((line) => past(line, QUOTE.exec(at(line)))));
    } else if (BULLET.test(text)) {
      i = list(parent, source, lines, i);
    } else {
      const inner = take(lines, i, (line) => at(line).trim() && !begins(at(line)));
      const last = inner.length ? inner : [lines[i]];
      i += last.length;
      paragraph(parent, source, last);
    }
  }
}

function begins(text) {
  return [FENCE, HEADING, QUOTE, BULLET].some((kind) => kind.test(text));
}

function take(lines, from, belongs) {
  let to = from;
  while (to < lines.length && belongs(lines[to])) to += 1;
  return lines.slice(from, to);
}

function past(line, found) {
  return { start: line.start + found[0].length, end: line.end };
}

// A fence that is still open is code too: the rest has not come yet.
function code(parent, source, lines, from, fence) {
  let to = from + 1;
  const closes = (line) => source.text.slice(line.start, line.end).trim() === fence;
  while (to < lines.length && !closes(lines[to])) to += 1;
  const inner = append(append(parent, "pre"), "code");
  if (to > from + 1) appendText(inner, source, lines[from + 1].start, lines[to - 1].end);
  return to + 1;
}

function list(parent, source, lines, from) {
  const first = BULLET.exec(source.text.slice(lines[from].start, lines[from].end));
  const ordered = /\d/.test(first[2]);
  const element = append(parent, ordered ? "ol" : "ul");
  if (ordered) element.start = parseInt(first[2], 10);
  let i = from;
  while (i < lines.length) {
    const found = BULLET.exec(source.text.slice(lines[i].start, lines[i].end));
    if (!found || found[1].length < first[1].length || /\d/.test(found[2]) !== ordered) break;
    // What is indented deeper belongs to the item, without its indentation.
    const own = [past(lines[i], found)];
    const depth = found[0].length;
    for (i += 1; i < lines.length; i += 1) {
      const text = source.text.slice(lines[i].start, lines[i].end);
      const indent = text.length - text.trimStart().length;
      if (!text.trim() || indent < Math.min(depth, first[1].length + 2)) break;
      own.push({ start: lines[i].start + Math.min(indent, depth), end: lines[i].end });
    }
    const item = append(element, "li");
    inline(item, source, own[0].start, own[0].end);
    if (own.length > 1) blocks(item, source, own.slice(1));
    while (i + 1 < lines.length && lines[i].end === lines[i].start && BULLET.test(source.text.slice(lines[i + 1].start, lines[i + 1].end))) i += 1;
  }
  return i;
}

function paragraph(parent, source, lines) {
  const element = append(parent, "p");
  lines.forEach((line, number) => {
    if (number > 0) append(element, "br");
    inline(element, source, line.start, line.end);
  });
}

function inline(parent, source, start, end) {
  let from = start;
  for (const found of source.text.slice(start, end).matchAll(INLINE)) {
    const place = start + found.index;
    const [whole, mono, bold, emphasis, label, address] = found;
    appendText(parent, source, from, place);
    from = place + whole.length;
    if (mono !== undefined) appendText(append(parent, "code"), source, place + 1, from - 1);
    else if (bold !== undefined) inline(append(parent, "strong"), source, place + 2, from - 2);
    else if (emphasis !== undefined) inline(append(parent, "em"), source, place + 1, from - 1);
    else {
      const link = append(parent, "a");
      link.href = address; // INLINE lets http and https through, and nothing else
      link.rel = "noopener noreferrer nofollow";
      link.target = "_blank";
      appendText(link, source, place + 1, place + 1 + label.length);
    }
  }
  appendText(parent, source, from, end);
}

// Append characters of the source, with a span around each run that was drafted.
function appendText(parent, source, start, end) {
  let from = start;
  while (from < end) {
    const drafted = source.drafted[from];
    let to = from + 1;
    while (to < end && source.drafted[to] === drafted) to += 1;
    const text = document.createTextNode(source.text.slice(from, to));
    if (drafted) {
      const span = append(parent, "span");
      span.className = "drafted";
      span.append(text);
    } else {
      parent.append(text);
    }
    from = to;
  }
}

function append(parent, name) {
  const element = document.createElement(name);
  parent.append(element);
  return element;
}
