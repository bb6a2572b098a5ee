// Texts that are seen and have less contrast against what is behind them than is asked for.
(least) => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const paint = canvas.getContext("2d", { willReadFrequently: true });
  const rgba = (color) => {
    paint.clearRect(0, 0, 1, 1);
    paint.fillStyle = color;
    paint.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], [x, y, z]) => [r * a + x * (1 - a), g * a + y * (1 - a), b * a + z * (1 - a), 1];
  const light = ([r, g, b]) => {
    const part = (value) => (value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
    return 0.2126 * part(r) + 0.7152 * part(g) + 0.0722 * part(b);
  };
  const behind = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      if (at instanceof SVGElement) continue;
      const color = rgba(getComputedStyle(at).backgroundColor);
      if (color[3] > 0) layers.push(color);
      if (color[3] === 1) break;
    }
    let found = [255, 255, 255, 1];
    for (const layer of layers.reverse()) found = over(layer, found);
    const svg = element.closest("svg");
    if (svg && element.tagName === "text") {
      const box = element.getBoundingClientRect();
      const [x, y] = [box.x + box.width / 2, box.y + box.height / 2];
      for (const band of svg.querySelectorAll("rect[fill-opacity]")) {
        const edge = band.getBoundingClientRect();
        if (x < edge.left || x > edge.right || y < edge.top || y > edge.bottom) continue;
        const color = rgba(getComputedStyle(band).fill);
        found = over([...color.slice(0, 3), Number(band.getAttribute("fill-opacity"))], found);
      }
    }
    return found;
  };
  const poor = [];
  let seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    const text = walker.currentNode.textContent.trim();
    if (!text || element.closest("script, style, title, desc, .unseen, .skip") || !element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const own = rgba(element instanceof SVGElement ? style.fill : style.color);
    const back = behind(element);
    const [a, b] = [light(over(own, back)), light(back)];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (contrast < least) poor.push(`${contrast.toFixed(2)}: ${text.slice(0, 40)}`);
  }
  return { seen, poor };
}
